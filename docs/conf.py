"""The docs site: the pages of this folder, and the public API from its docstrings. `make docs` builds it."""

from importlib import metadata

project = "ParaCaption"
author = "The ParaCaption authors"
copyright = author
version = release = metadata.version("paracaption")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images", "_build"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3
default_role = "literal"  # docstrings mark code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False

html_theme = "furo"
html_title = f"ParaCaption {release}"
html_static_path = []
html_show_sourcelink = False
