"""Images: made from generated Dockerfiles, named, looked into, checked. Nothing here imports torch or knows of runs at work."""
