//! The memory of what lies between the products: each thread's own, used again from step to step.

use std::cell::{Cell, RefCell};

/// What lies between the products. It is never cleared, and only grows.
pub struct Work {
    pub x: Vec<f32>,
    pub normed: Vec<f32>,
    pub qkv: Vec<f32>,
    pub attended: Vec<f32>,
    pub gate_up: Vec<f32>,
    pub gated: Vec<f32>,
    pub logits: Vec<f32>,
}

thread_local! {
    /// Taken out while it is in use: a thread that waits for others may begin another batch meanwhile.
    pub static WORK: Cell<Work> = const { Cell::new(Work::NONE) };
    /// Attention's scores.
    pub static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Default for Work {
    fn default() -> Self {
        Self::NONE
    }
}

impl Work {
    const NONE: Self = Self {
        x: Vec::new(),
        normed: Vec::new(),
        qkv: Vec::new(),
        attended: Vec::new(),
        gate_up: Vec::new(),
        gated: Vec::new(),
        logits: Vec::new(),
    };
}

/// The first `length` floats of a buffer, whatever they are.
pub fn room(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
    &mut buffer[..length]
}
