"""Products of multivectors in Clifford algebras."""
