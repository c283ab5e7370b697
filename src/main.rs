//! The `grlm` program: tunes the allocator, then hands over to [`grlm::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    grlm::allocator::tune();
    grlm::cli::main()
}
