"""Language models of transformers: built without memory, loaded, adapted and exported."""
