"""Files to frames: videos, images, folders of frames."""
