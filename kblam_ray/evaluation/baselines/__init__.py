"""What a knowledge model is compared with, on the same questions and the same facts."""
