"""Language models of transformers: built on the meta device, loaded, adapted and exported."""
