"""minilm_fast inside other libraries."""
