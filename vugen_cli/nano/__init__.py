"""The embedded world: OpenMoji scenes, the small VLM and its judge, the demo. Nothing below imports it."""
