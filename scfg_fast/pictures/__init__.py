"""Pictures of regions: `overlay` draws them on an image, `sheets` arranges images, `style` has colours and text."""
