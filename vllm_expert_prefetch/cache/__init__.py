"""Which experts are in the slots, and who brings the others: one contract (`base`), one implementation per platform."""
