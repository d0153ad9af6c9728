"""Stages take the images of a unit and decide about regions; recipes put them in order."""
