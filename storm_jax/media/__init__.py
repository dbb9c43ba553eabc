"""Media files to frames: videos, images, folders of frames."""
