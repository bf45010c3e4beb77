"""Live views in a notebook: ipywidgets and strings of HTML, no JavaScript of our own, no torch."""
