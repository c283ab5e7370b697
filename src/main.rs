//! The `grlm` program.

fn main() {}
