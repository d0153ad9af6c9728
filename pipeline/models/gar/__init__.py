"""GAR (Grasp Any Region): our own vision side, and the checkpoint's language model in vLLM."""
