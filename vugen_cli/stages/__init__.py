"""What is trained: reducer and decoder, sampler, VAE, distillation, the latent cache, and their losses."""
