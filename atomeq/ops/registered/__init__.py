"""Operations registered with torch: opaque to torch.compile, closed under differentiation."""
