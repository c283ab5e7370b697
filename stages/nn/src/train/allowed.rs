//! Cross-entropy among what a catalogue allows: at every token of a TID the softmax runs over the tokens that can
//! follow in the trie of all TIDs, and not over the vocabulary.
//!
//! The product of these probabilities is a probability over the catalogue (a hierarchical softmax whose tree is the
//! trie; Morin and Bengio 2005): what `generate` scores under [`crate::generate::Normalize::Allowed`]. Most tokens have
//! few alternatives or none, so that the head costs a fraction of the whole one: only first tokens take a matrix
//! product, over the tokens that any TID begins with.

use rayon::prelude::*;

use super::{
    batch::Batch,
    cross_entropy::{self, cross_entropy, row_loss},
    kernels::{dot, with_simd},
};
use crate::generate::{Node, Trie};

/// Rows that one task works on.
const ROWS: usize = 16;

/// What a batch's targets choose.
#[derive(Default)]
struct Choices {
    /// First tokens, where there are several.
    first: Vec<Choice>,
    later: Vec<Choice>,
}

/// A target among the alternatives of its node.
struct Choice {
    /// The row of `hidden`.
    row: usize,
    node: Node,
    /// Its place among the node's tokens.
    index: usize,
}

/// Whether `tokens` are TIDs of the trie, one after another and whole.
pub fn is_written(trie: &Trie, tokens: &[u32]) -> bool {
    let mut node = trie.root();
    for token in tokens {
        let Ok(index) = trie.tokens(node).binary_search(token) else { return false };
        node = after(trie, trie.child(node, index));
    }
    node == trie.root()
}

/// The node that follows: behind a whole TID a new one begins.
fn after(trie: &Trie, node: Node) -> Node {
    if trie.tokens(node).is_empty() { trie.root() } else { node }
}

/// Walks each run of targets down the trie from its root. Targets that are no choice, and those that the trie does not
/// have, are passed over.
fn choices(trie: &Trie, batch: &Batch) -> Choices {
    let mut choices = Choices::default();
    let (mut node, mut next) = (Some(trie.root()), usize::MAX);
    for (row, &(place, token)) in batch.targets.iter().enumerate() {
        if place != next {
            node = Some(trie.root());
        }
        next = place + 1;
        node = node.and_then(|node| {
            let index = trie.tokens(node).binary_search(&token).ok()?;
            if trie.tokens(node).len() > 1 {
                let into = if node == trie.root() { &mut choices.first } else { &mut choices.later };
                into.push(Choice { row, node, index });
            }
            Some(after(trie, trie.child(node, index)))
        });
    }
    choices
}

/// As [`cross_entropy`], for the targets of `batch`, whose hidden states are the rows of `hidden`, among what `trie`
/// allows.
pub fn cross_entropy_allowed(
    trie: &Trie,
    batch: &Batch,
    hidden: &[f32],
    head: &[f32],
    width: usize,
    logits: &mut Vec<f32>,
    gradients: Option<cross_entropy::Gradients<'_>>,
) -> f64 {
    let choices = choices(trie, batch);
    let mut gradients = gradients;
    if let Some(g) = &mut gradients {
        g.d_hidden.fill(0.0);
    }
    let rows = choices.first.iter().map(|choice| (choice.row, choice.index as u32)).collect::<Vec<_>>();
    let loss = told_among(trie.tokens(trie.root()), &rows, (hidden, head, width), logits, &mut gradients);
    loss + later_tokens(trie, &choices.later, hidden, head, width, gradients)
}

/// One softmax over `tokens`, whose rows of the head are brought together. `rows` are rows of the hidden states, and the
/// place of each one's target among `tokens`; then come the hidden states and the head, with the width of both.
fn told_among(
    tokens: &[u32],
    rows: &[(usize, u32)],
    (hidden, head, width): (&[f32], &[f32], usize),
    logits: &mut Vec<f32>,
    gradients: &mut Option<cross_entropy::Gradients<'_>>,
) -> f64 {
    let row = |of: &'_ [f32], at: usize| of[at * width..(at + 1) * width].to_vec();
    let some_head: Vec<f32> = tokens.iter().flat_map(|&token| row(head, token as usize)).collect();
    let some_hidden: Vec<f32> = rows.iter().flat_map(|&(at, _)| row(hidden, at)).collect();
    let targets: Vec<u32> = rows.iter().map(|&(_, target)| target).collect();
    let Some(g) = gradients else {
        return cross_entropy(&some_hidden, &some_head, width, &targets, logits, None);
    };
    let (mut d_hidden, mut d_head) = (vec![0.0; some_hidden.len()], vec![0.0; some_head.len()]);
    let some = cross_entropy::Gradients {
        d_hidden: &mut d_hidden,
        d_head: g.d_head.is_some().then_some(d_head.as_mut_slice()),
        scale: g.scale,
    };
    let loss = cross_entropy(&some_hidden, &some_head, width, &targets, logits, Some(some));
    for (&(at, _), d) in rows.iter().zip(d_hidden.chunks_exact(width)) {
        add(&mut g.d_hidden[at * width..(at + 1) * width], d, 1.0);
    }
    if let Some(all) = &mut g.d_head {
        for (&token, d) in tokens.iter().zip(d_head.chunks_exact(width)) {
            add(&mut all[token as usize * width..(token as usize + 1) * width], d, 1.0);
        }
    }
    loss
}

/// Later tokens: a few alternatives each, row by row.
fn later_tokens(
    trie: &Trie,
    choices: &[Choice],
    hidden: &[f32],
    head: &[f32],
    width: usize,
    gradients: Option<cross_entropy::Gradients<'_>>,
) -> f64 {
    let scale = gradients.as_ref().map(|g| g.scale);
    let at = |token: u32| token as usize * width..(token as usize + 1) * width;
    // Each row's loss, the gradients of its logits, and that of its hidden state.
    let rows: Vec<(f64, Vec<f32>, Vec<f32>)> = choices
        .par_iter()
        .with_min_len(ROWS)
        .map(|choice| {
            with_simd(
                #[inline(always)]
                || {
                    let tokens = trie.tokens(choice.node);
                    let hidden = &hidden[choice.row * width..(choice.row + 1) * width];
                    let mut logits: Vec<f32> = tokens.iter().map(|&token| dot(hidden, &head[at(token)])).collect();
                    let loss = row_loss(&mut logits, choice.index, scale);
                    let mut d_hidden = vec![0.0; if scale.is_some() { width } else { 0 }];
                    if scale.is_some() {
                        for (&token, &d) in tokens.iter().zip(&logits) {
                            add_scaled(&mut d_hidden, &head[at(token)], d);
                        }
                    }
                    (loss, logits, d_hidden)
                },
            )
        })
        .collect();
    if let Some(g) = gradients {
        let mut d_head = g.d_head;
        for (choice, (_, d_logits, d)) in choices.iter().zip(&rows) {
            let row = choice.row * width..(choice.row + 1) * width;
            add(&mut g.d_hidden[row.clone()], d, 1.0);
            if let Some(all) = &mut d_head {
                for (&token, &d) in trie.tokens(choice.node).iter().zip(d_logits) {
                    add(&mut all[at(token)], &hidden[row.clone()], d);
                }
            }
        }
    }
    rows.iter().map(|(loss, ..)| loss).sum()
}

/// `into += x · factor`.
fn add(into: &mut [f32], x: &[f32], factor: f32) {
    with_simd(
        #[inline(always)]
        || add_scaled(into, x, factor),
    );
}

#[inline(always)]
fn add_scaled(into: &mut [f32], x: &[f32], factor: f32) {
    for (into, x) in into.iter_mut().zip(x) {
        *into += x * factor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIDS: [[u32; 3]; 6] = [[1, 2, 3], [1, 2, 4], [1, 5, 3], [6, 2, 4], [7, 7, 7], [6, 1, 2]];
    const WIDTH: usize = 20;
    const VOCABULARY: usize = 9;

    fn numbers(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin()).collect()
    }

    /// A start token, then items; the second sample is learned from its second item on.
    fn batch() -> Batch {
        let mut batch = Batch::default();
        for (items, learned_from) in [(&[0usize, 4, 3][..], 1), (&[2, 1], 4), (&[5], 1)] {
            let tokens: Vec<u32> = std::iter::once(0).chain(items.iter().flat_map(|&i| TIDS[i])).collect();
            batch.push(&tokens, learned_from);
        }
        batch
    }

    /// The loss by its definition, in double precision: the softmax over the tokens that TIDs with the same beginning
    /// go on with.
    fn definition(batch: &Batch, hidden: &[f32], head: &[f32]) -> f64 {
        let mut loss = 0.0;
        for (row, &(place, target)) in batch.targets.iter().enumerate() {
            let depth = batch.positions[place] as usize % 3;
            let before = &batch.tokens[place + 1 - depth..=place];
            let mut allowed: Vec<u32> = TIDS.iter().filter(|t| t[..depth] == *before).map(|t| t[depth]).collect();
            allowed.sort_unstable();
            allowed.dedup();
            let logit = |token: u32| -> f64 {
                let (h, e) = (&hidden[row * WIDTH..], &head[token as usize * WIDTH..]);
                h.iter().zip(e).take(WIDTH).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            loss += allowed.iter().map(|&t| logit(t).exp()).sum::<f64>().ln() - logit(target);
        }
        loss
    }

    #[test]
    fn loss_and_gradients_are_those_of_the_definition() {
        let (trie, batch) = (Trie::new(&TIDS).unwrap(), batch());
        assert_eq!(batch.targets.len(), 15);
        let (hidden, head) = (numbers(15 * WIDTH, 0.3), numbers(VOCABULARY * WIDTH, 0.7));
        let (mut d_hidden, mut d_head) = (vec![9.0; hidden.len()], vec![0.0; head.len()]);
        let gradients = cross_entropy::Gradients { d_hidden: &mut d_hidden, d_head: Some(&mut d_head), scale: 0.5 };
        let mut logits = Vec::new();
        let loss = cross_entropy_allowed(&trie, &batch, &hidden, &head, WIDTH, &mut logits, Some(gradients));
        assert!((loss - definition(&batch, &hidden, &head)).abs() < 1e-4);
        let plain = cross_entropy_allowed(&trie, &batch, &hidden, &head, WIDTH, &mut logits, None);
        assert_eq!(loss.to_bits(), plain.to_bits());
        let step = 1e-2f32;
        let moved = |values: &[f32], i: usize, by: f32| {
            let mut values = values.to_vec();
            values[i] += by;
            values
        };
        for i in (0..hidden.len()).step_by(7) {
            let at = |by: f32| definition(&batch, &moved(&hidden, i, by), &head);
            let exact = 0.5 * (at(step) - at(-step)) / f64::from(2.0 * step);
            assert!((f64::from(d_hidden[i]) - exact).abs() < 1e-3, "{i}: {} and {exact}", d_hidden[i]);
        }
        for i in (0..head.len()).step_by(3) {
            let at = |by: f32| definition(&batch, &hidden, &moved(&head, i, by));
            let exact = 0.5 * (at(step) - at(-step)) / f64::from(2.0 * step);
            assert!((f64::from(d_head[i]) - exact).abs() < 1e-3, "{i}: {} and {exact}", d_head[i]);
        }
    }

    #[test]
    fn what_is_not_whole_tids_is_told() {
        let trie = Trie::new(&TIDS).unwrap();
        assert!(is_written(&trie, &[1, 2, 3, 7, 7, 7]) && is_written(&trie, &[]));
        assert!(!is_written(&trie, &[1, 2]) && !is_written(&trie, &[1, 2, 7]) && !is_written(&trie, &[2, 2, 3]));
    }
}
