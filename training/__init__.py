"""How the bundled text-to-image model was made: data, autoencoder, diffusion training, judge, export.

Needed only to train or to re-measure the model, never to use it. See ``README.md`` in this folder for the commands.
"""
