//! End to end: the real `grlm`, in an empty environment. Logic is tested where it lives; here, the wiring.

mod cached;
mod concurrent;
mod devices;
mod disks;
mod engine;
mod environment;
mod errors;
mod failures;
mod logs;
mod partial;
mod pipelines;
mod robust;
mod rows;
mod store;
mod torture;
mod training;
mod variants;
mod worker;
