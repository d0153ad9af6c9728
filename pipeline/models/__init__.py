"""The models behind the stages: `protocols.py` says what a backend is, `registry.py` lists ours."""
