"""One denoising step of a pipeline call.

`context` says what is known of the call, `plan` what a step does. `finder` turns maps into a guided prediction,
`rewrite` says what is returned in place of the denoiser's, and `hook` returns it. `corrections` evaluates the denoiser
again, and `scheduler` surrounds the scheduler's step.
"""
