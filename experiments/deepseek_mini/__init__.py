"""A small model of DeepSeek-V3's shape on real text, over pipeline and experts at once."""
