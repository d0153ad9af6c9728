"""What flows through ParaCaption: records, reasons, errors, configuration, manifests. No I/O."""
