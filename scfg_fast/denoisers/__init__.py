"""The denoisers that S-CFG reads: where their attention is, what they are called with, what they predict.

`unet` and `transformers` describe them, `readers` says what their attention layers compare, `registry` finds the
description of a model, and `install` puts capture processors into one for a call.
"""
