"""`diffattn calibrate`: finds a policy for a model by rendering with it."""
