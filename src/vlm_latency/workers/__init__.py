"""One plan on several devices: one process per device, through Ray, and one journal."""
