"""The Serve application: thin deployments around the plain classes, and the calls between them."""
