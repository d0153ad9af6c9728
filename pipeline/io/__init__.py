"""Reading and writing files: folders and URLs, photos, drawings, weights."""
