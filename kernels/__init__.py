"""OpenCL C sources, one per operation; read with importlib.resources by `dpresnet.device`."""
