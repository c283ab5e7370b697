//! What the stages of a run are expected to need, by what the store remembers: their order follows from it.

use grlm_cache::Store;

use super::{
    measured::Measured,
    work::{NodeId, Work},
};
use crate::device::Machine;

/// What things are expected to need, by what the store remembers.
pub(super) struct Outlook {
    pub measured: Vec<Option<Measured>>,
    /// The longest path from a node to an end of the graph, in seconds: those go first.
    pub remaining: Vec<f64>,
}

impl Outlook {
    /// What a stage that never ran counts for.
    const UNKNOWN: f64 = 1.0;
    /// In larger graphs, asking for every stage costs more than a better order gains.
    const LARGE: usize = 500;

    pub fn new(store: &Store, work: &Work, machine: &Machine) -> Self {
        let ask = work.nodes.len() <= Self::LARGE;
        let measured: Vec<Option<Measured>> =
            (0..work.nodes.len()).map(|id| ask.then(|| Measured::of(store, work.stage(id), machine))).collect();
        let mut outlook = Self { measured, remaining: vec![0.0f64; work.nodes.len()] };
        for id in (0..work.nodes.len()).rev() {
            let behind = work.nodes[id].dependents.iter().map(|&d| outlook.remaining[d]).fold(0.0, f64::max);
            outlook.remaining[id] = outlook.estimate(id).unwrap_or(Self::UNKNOWN) + behind;
        }
        outlook
    }

    pub fn estimate(&self, id: NodeId) -> Option<f64> {
        self.measured[id].as_ref().map(|measured| measured.seconds).filter(|seconds| *seconds > 0.0)
    }
}
