"""Parts of the distillation (paper, section 3.3): losses, their balance, noise, optimizer. Needs torch only.

`losses`: the four losses. `balance`: their weights from gradient norms. `perceptual`: E-LatentLPIPS, where installed.
`timesteps`: timesteps and noise of a batch. `optimizers`: Muon with AdamW, learning rate, averaged weights.
"""
