"""The frozen vision-language model: images to latents, prompts to a prefix."""
