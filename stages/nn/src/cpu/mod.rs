//! CPU arithmetic in f32 for inference. What it promises: **a row's result does not depend on what else is in the
//! batch, on the number of threads, or on the vector width of the processor.**
//!
//! Every element of a product is one chain of fused multiply-adds over the inner dimension, in its order; blocking
//! and threads only decide when a link of the chain is computed, never the order of links. Sums along a row use 16
//! fixed lanes whatever the hardware has. So any batch, shard or resumed run gives the same bytes.
//!
//! Training has kernels of its own, with their gradients ([`crate::train`]); a parity test ties the two.

mod isa;
mod kernel;
pub mod matmul;
pub mod ops;
pub mod panels;

pub use matmul::{Accumulate, Rows, RowsMut, matmul};
pub use panels::{Panels, PanelsView, WIDTH};
