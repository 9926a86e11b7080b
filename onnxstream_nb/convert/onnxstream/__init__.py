"""OnnxStream's folders: graphs taken apart for its operators, its weights, its vocabularies."""
