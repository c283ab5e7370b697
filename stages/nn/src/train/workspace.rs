//! The memory that passes over batches share.

use super::{layer::Tape, lora};

/// Memory for one batch, reused from batch to batch.
#[derive(Default)]
pub struct Workspace {
    /// One for each layer; under recomputation only one, and each layer's input in `inputs`.
    pub tapes: Vec<Tape>,
    pub inputs: Vec<Vec<f32>>,
    pub x: Vec<f32>,
    pub again: Vec<f32>,
    pub normed: Vec<f32>,
    pub inverse: Vec<f32>,
    pub branch: Vec<f32>,
    pub selected: Vec<f32>,
    pub d_selected: Vec<f32>,
    pub logits: Vec<f32>,
    pub dx: Vec<f32>,
    pub d_normed: Vec<f32>,
    pub d_wide: Vec<f32>,
    pub d_heads: Vec<f32>,
    pub d_attended: Vec<f32>,
    pub lora: lora::Scratch,
}

#[cfg(test)]
impl Workspace {
    /// Numbers held so far.
    pub fn len(&self) -> usize {
        let shared = [
            &self.x,
            &self.again,
            &self.normed,
            &self.inverse,
            &self.branch,
            &self.selected,
            &self.d_selected,
            &self.logits,
            &self.dx,
            &self.d_normed,
            &self.d_wide,
            &self.d_heads,
            &self.d_attended,
        ];
        let tapes: usize = self.tapes.iter().map(Tape::len).sum();
        // The last block of logits may be shorter than the others were.
        tapes + self.inputs.iter().chain(shared).map(Vec::capacity).sum::<usize>()
    }
}
