"""What flows through ParaCaption: records, reasons, errors, configuration, manifests. No I/O, no torch, no ray."""
