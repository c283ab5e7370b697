//! Takes, for every stage kind, the digest of the code that its results depend on.
//!
//! Starting at the file that holds `impl Stage for`, every module of this crate or of `grlm-nn` that it names is
//! reached, and theirs in turn. Comments, layout, documentation and tests are not part of a token stream as hashed
//! here, so they never rerun a stage; nor does another stage's code.

#[path = "build/digest.rs"]
mod digest;

fn main() {
    digest::write_code_digests();
}
