"""The networks of the method: reducer, pixel decoder, generation expert."""
