//! The network between the item embeddings and the scores: learned positions, pre-norm transformer blocks, a last
//! normalisation. Forward and backward by hand over ragged batches, without any padding.
//!
//! After Kang and McAuley, "Self-Attentive Sequential Recommendation" (arXiv 1808.09781), with the block layout of
//! later practice: `x += attention(norm(x))`, `x += down(activation(up(norm(x))))`. Losses live in `loss`.

use std::ops::Range;

use rand::Rng;

use super::{
    attention::{Shape, attend, attend_backward},
    config::{Activation, Architecture},
    kernels::{
        Dropout, activate, activate_backward, add, add_bias, add_bias_backward, apply_mask, layer_norm,
        layer_norm_backward,
    },
    matmul::{Into, Matrix, matmul},
};

/// Where each tensor of the network lies in one flat vector; item embeddings are apart.
#[derive(Debug, Clone)]
pub struct Layout {
    position: Range<usize>,
    layers: Vec<LayerLayout>,
    final_norm: NormLayout,
    len: usize,
    tensors: Vec<Tensor>,
}

/// A named tensor of the network.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub place: Range<usize>,
}

#[derive(Debug, Clone)]
struct LayerLayout {
    attention_norm: NormLayout,
    qkv: LinearLayout,
    output: LinearLayout,
    feed_forward_norm: NormLayout,
    up: LinearLayout,
    down: LinearLayout,
}

#[derive(Debug, Clone)]
struct NormLayout {
    weight: Range<usize>,
    bias: Range<usize>,
}

#[derive(Debug, Clone)]
struct LinearLayout {
    weight: Range<usize>,
    bias: Range<usize>,
    inputs: usize,
    outputs: usize,
}

impl Layout {
    pub fn new(architecture: &Architecture) -> Self {
        let Architecture { hidden, layers, feed_forward, max_length, .. } = *architecture;
        let mut tensors = Vec::new();
        let mut len = 0;
        let mut tensor = |name: String, shape: Vec<usize>| {
            let place = len..len + shape.iter().product::<usize>();
            len = place.end;
            tensors.push(Tensor { name, shape, place: place.clone() });
            place
        };
        let position = tensor("position_embedding.weight".to_owned(), vec![max_length, hidden]);
        let norm = |name: &str, tensor: &mut dyn FnMut(String, Vec<usize>) -> Range<usize>| NormLayout {
            weight: tensor(format!("{name}.weight"), vec![hidden]),
            bias: tensor(format!("{name}.bias"), vec![hidden]),
        };
        let linear =
            |name: &str, outputs, inputs, tensor: &mut dyn FnMut(String, Vec<usize>) -> Range<usize>| LinearLayout {
                weight: tensor(format!("{name}.weight"), vec![outputs, inputs]),
                bias: tensor(format!("{name}.bias"), vec![outputs]),
                inputs,
                outputs,
            };
        let layers = (0..layers)
            .map(|i| LayerLayout {
                attention_norm: norm(&format!("layers.{i}.attention_norm"), &mut tensor),
                qkv: linear(&format!("layers.{i}.attention.qkv"), 3 * hidden, hidden, &mut tensor),
                output: linear(&format!("layers.{i}.attention.output"), hidden, hidden, &mut tensor),
                feed_forward_norm: norm(&format!("layers.{i}.feed_forward_norm"), &mut tensor),
                up: linear(&format!("layers.{i}.feed_forward.up"), feed_forward, hidden, &mut tensor),
                down: linear(&format!("layers.{i}.feed_forward.down"), hidden, feed_forward, &mut tensor),
            })
            .collect();
        let final_norm = norm("final_norm", &mut tensor);
        Self { position, layers, final_norm, len, tensors }
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Every tensor, in the order of the flat vector.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Matrices from N(0, 0.02²), norms at 1, biases at 0.
    pub fn initialise(&self, rng: &mut impl Rng) -> Vec<f32> {
        let mut network = vec![0.0; self.len];
        for tensor in &self.tensors {
            let values = &mut network[tensor.place.clone()];
            if tensor.shape.len() > 1 {
                fill_normal(values, 0.02, rng);
            } else if tensor.name.ends_with("norm.weight") {
                values.fill(1.0);
            }
        }
        network
    }
}

/// Fills `values` from N(0, deviation²), by Box and Muller's method.
pub fn fill_normal(values: &mut [f32], deviation: f32, rng: &mut impl Rng) {
    values.fill_with(|| {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        // 1 - u lies in (0, 1], so that its logarithm is finite.
        deviation * ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    });
}

/// Whole sequences that one thread works on: their items one after another, and the rows of each.
#[derive(Debug, Clone, Default)]
pub struct Piece {
    pub items: Vec<u32>,
    pub sequences: Vec<Range<usize>>,
}

impl Piece {
    pub fn push(&mut self, items: &[u32]) {
        let start = self.items.len();
        self.items.extend_from_slice(items);
        self.sequences.push(start..self.items.len());
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.items.len()
    }
}

/// What the forward pass leaves for the backward pass. Buffers are reused from batch to batch.
#[derive(Debug, Default)]
pub struct Activations {
    layers: Vec<LayerActivations>,
    embedding_mask: Vec<f32>,
    final_norm: NormActivations,
    /// The last hidden states, `[rows, hidden]`.
    pub hidden: Vec<f32>,
}

#[derive(Debug, Default)]
struct NormActivations {
    normalised: Vec<f32>,
    inverse: Vec<f32>,
}

#[derive(Debug, Default)]
struct LayerActivations {
    attention_norm: NormActivations,
    attention_input: Vec<f32>,
    qkv: Vec<f32>,
    probabilities: Vec<f32>,
    probability_mask: Vec<f32>,
    context: Vec<f32>,
    attention_mask: Vec<f32>,
    feed_forward_norm: NormActivations,
    feed_forward_input: Vec<f32>,
    up: Vec<f32>,
    activated: Vec<f32>,
    activated_mask: Vec<f32>,
    output_mask: Vec<f32>,
}

/// Dropout of one forward pass: where masks come from, and the two shares.
pub struct DropoutPlan<'a> {
    pub source: &'a mut Dropout,
    pub dropout: f32,
    pub attention: f32,
}

impl DropoutPlan<'_> {
    fn fill(plan: &mut Option<&mut Self>, mask: &mut Vec<f32>, len: usize) {
        match plan {
            Some(plan) => plan.source.fill(mask, len, plan.dropout),
            None => mask.clear(),
        }
    }
}

fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl NormActivations {
    fn forward(&mut self, y: &mut Vec<f32>, x: &[f32], network: &[f32], layout: &NormLayout) {
        let width = layout.weight.len();
        layer_norm(
            resized(y, x.len()),
            resized(&mut self.normalised, x.len()),
            resized(&mut self.inverse, x.len() / width),
            x,
            &network[layout.weight.clone()],
            &network[layout.bias.clone()],
        );
    }

    fn backward(&self, x_grad: &mut [f32], y_grad: &[f32], network: &[f32], grad: &mut [f32], layout: &NormLayout) {
        // A norm's weight and bias lie side by side.
        let both = &mut grad[layout.weight.start..layout.bias.end];
        let (weight_grad, bias_grad) = both.split_at_mut(layout.weight.len());
        let weight = &network[layout.weight.clone()];
        layer_norm_backward(x_grad, weight_grad, bias_grad, y_grad, &self.normalised, &self.inverse, weight);
    }
}

impl LinearLayout {
    fn forward(&self, y: &mut Vec<f32>, x: &[f32], network: &[f32]) {
        let rows = x.len() / self.inputs;
        let weight = Matrix::new(&network[self.weight.clone()], self.outputs, self.inputs);
        let y = resized(y, rows * self.outputs);
        matmul(y, Into::Replace, Matrix::new(x, rows, self.inputs), weight.transposed());
        add_bias(y, &network[self.bias.clone()]);
    }

    /// Writes the gradient of `x`, and adds those of weight and bias.
    fn backward(&self, x_grad: &mut Vec<f32>, y_grad: &[f32], x: &[f32], network: &[f32], grad: &mut [f32]) {
        let rows = x.len() / self.inputs;
        let y_matrix = Matrix::new(y_grad, rows, self.outputs);
        let x_matrix = Matrix::new(x, rows, self.inputs);
        matmul(&mut grad[self.weight.clone()], Into::Add, y_matrix.transposed(), x_matrix);
        add_bias_backward(&mut grad[self.bias.clone()], y_grad);
        let weight = Matrix::new(&network[self.weight.clone()], self.outputs, self.inputs);
        matmul(resized(x_grad, x.len()), Into::Replace, y_matrix, weight);
    }
}

/// The network over borrowed parameters.
#[derive(Debug, Clone, Copy)]
pub struct Network<'a> {
    pub layout: &'a Layout,
    pub parameters: &'a [f32],
    /// Item embeddings, `[items, hidden]`.
    pub items: &'a [f32],
    pub hidden: usize,
    pub heads: usize,
    pub activation: Activation,
}

impl Network<'_> {
    /// Fills `activations`, whose `hidden` is the result. Sequences must be no longer than `max_length`, and hold
    /// items that exist.
    pub fn forward(&self, piece: &Piece, activations: &mut Activations, mut dropout: Option<&mut DropoutPlan>) {
        let hidden = self.hidden;
        let size = piece.rows() * hidden;
        let Activations { layers, embedding_mask, final_norm, hidden: result } = activations;
        layers.resize_with(self.layout.layers.len(), LayerActivations::default);

        let mut x = vec![0.0; size];
        let positions = &self.parameters[self.layout.position.clone()];
        for sequence in &piece.sequences {
            for (row, position) in sequence.clone().zip(positions.chunks_exact(hidden)) {
                let item = piece.items[row] as usize * hidden;
                let x = &mut x[row * hidden..][..hidden];
                x.copy_from_slice(&self.items[item..item + hidden]);
                add(x, position);
            }
        }
        DropoutPlan::fill(&mut dropout, embedding_mask, size);
        apply_mask(&mut x, embedding_mask);

        let shape = Shape { sequences: &piece.sequences, hidden, heads: self.heads };
        let mut branch = Vec::new();
        for (layout, layer) in self.layout.layers.iter().zip(layers) {
            layer.attention_norm.forward(&mut layer.attention_input, &x, self.parameters, &layout.attention_norm);
            layout.qkv.forward(&mut layer.qkv, &layer.attention_input, self.parameters);
            let places = shape.probabilities();
            match &mut dropout {
                Some(plan) => plan.source.fill(&mut layer.probability_mask, places, plan.attention),
                None => layer.probability_mask.clear(),
            }
            attend(
                resized(&mut layer.context, size),
                resized(&mut layer.probabilities, places),
                shape,
                &layer.qkv,
                &layer.probability_mask,
            );
            layout.output.forward(&mut branch, &layer.context, self.parameters);
            DropoutPlan::fill(&mut dropout, &mut layer.attention_mask, size);
            apply_mask(&mut branch, &layer.attention_mask);
            add(&mut x, &branch);

            layer.feed_forward_norm.forward(
                &mut layer.feed_forward_input,
                &x,
                self.parameters,
                &layout.feed_forward_norm,
            );
            layout.up.forward(&mut layer.up, &layer.feed_forward_input, self.parameters);
            activate(self.activation, resized(&mut layer.activated, layer.up.len()), &layer.up);
            DropoutPlan::fill(&mut dropout, &mut layer.activated_mask, layer.up.len());
            apply_mask(&mut layer.activated, &layer.activated_mask);
            layout.down.forward(&mut branch, &layer.activated, self.parameters);
            DropoutPlan::fill(&mut dropout, &mut layer.output_mask, size);
            apply_mask(&mut branch, &layer.output_mask);
            add(&mut x, &branch);
        }
        final_norm.forward(result, &x, self.parameters, &self.layout.final_norm);
    }

    /// Adds the gradients of the network's parameters to `grad`, and returns those of the rows' item embeddings,
    /// `[rows, hidden]`, given those of the hidden states.
    pub fn backward(
        &self,
        piece: &Piece,
        activations: &Activations,
        hidden_grad: &[f32],
        grad: &mut [f32],
    ) -> Vec<f32> {
        let size = piece.rows() * self.hidden;
        let shape = Shape { sequences: &piece.sequences, hidden: self.hidden, heads: self.heads };
        let mut x_grad = vec![0.0; size];
        activations.final_norm.backward(&mut x_grad, hidden_grad, self.parameters, grad, &self.layout.final_norm);

        let (mut branch, mut inner, mut wide) = (Vec::new(), Vec::new(), Vec::new());
        for (layout, layer) in self.layout.layers.iter().zip(&activations.layers).rev() {
            branch.clone_from(&x_grad);
            apply_mask(&mut branch, &layer.output_mask);
            layout.down.backward(&mut wide, &branch, &layer.activated, self.parameters, grad);
            apply_mask(&mut wide, &layer.activated_mask);
            activate_backward(self.activation, &mut wide, &layer.up);
            layout.up.backward(&mut inner, &wide, &layer.feed_forward_input, self.parameters, grad);
            layer.feed_forward_norm.backward(&mut x_grad, &inner, self.parameters, grad, &layout.feed_forward_norm);

            branch.clone_from(&x_grad);
            apply_mask(&mut branch, &layer.attention_mask);
            layout.output.backward(&mut inner, &branch, &layer.context, self.parameters, grad);
            attend_backward(
                resized(&mut wide, 3 * size),
                shape,
                &inner,
                &layer.qkv,
                &layer.probabilities,
                &layer.probability_mask,
            );
            layout.qkv.backward(&mut inner, &wide, &layer.attention_input, self.parameters, grad);
            layer.attention_norm.backward(&mut x_grad, &inner, self.parameters, grad, &layout.attention_norm);
        }

        apply_mask(&mut x_grad, &activations.embedding_mask);
        let positions = &mut grad[self.layout.position.clone()];
        for sequence in &piece.sequences {
            for (row, position) in sequence.clone().zip(positions.chunks_exact_mut(self.hidden)) {
                add(position, &x_grad[row * self.hidden..][..self.hidden]);
            }
        }
        x_grad
    }
}
