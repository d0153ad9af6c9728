"""Everything that lies in the output folder: work list, shards, ledgers, index, card, events, exports."""
