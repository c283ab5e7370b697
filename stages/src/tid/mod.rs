//! Stage `tid`.

pub mod parse;
pub mod prompt;
pub mod statistics;
