//! The likeliest token at every step.

use super::Generator;
use crate::{Error, qwen3::Step};

/// Continues every prompt by its likeliest tokens (of equals, the first) until `stop(what was written)` or `max_new`
/// tokens. What is returned ends with the token that made it stop.
///
/// # Errors
/// As [`crate::qwen3::Qwen3::read`], and a model without a head.
pub fn greedy(
    generator: &Generator,
    prompts: &[&[u32]],
    max_new: usize,
    stop: impl Fn(&[u32]) -> bool + Sync,
) -> Result<Vec<Vec<u32>>, Error> {
    let tokens = |prompt: &&[u32]| prompt.len() + max_new;
    generator.share_out(prompts, tokens, |prompts, threads| batch(generator, prompts, max_new, &stop, threads))
}

fn batch(
    generator: &Generator,
    prompts: &[&[u32]],
    max_new: usize,
    stop: &impl Fn(&[u32]) -> bool,
    threads: usize,
) -> Result<Vec<Vec<u32>>, Error> {
    let mut written: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let (mut branches, mut hidden) = generator.read(prompts, max_new, threads)?;
    let mut paths: Vec<[Vec<u32>; 1]> = vec![[Vec::new()]; prompts.len()];
    let mut going: Vec<usize> = if max_new == 0 { Vec::new() } else { (0..prompts.len()).collect() };
    while !going.is_empty() {
        let best = generator.model.likeliest(&hidden, threads)?;
        for (which, token) in going.iter().zip(best) {
            written[*which].push(token);
        }
        going.retain(|which| written[*which].len() < max_new && !stop(&written[*which]));
        let step = |&prompt: &usize| Step {
            prompt,
            tokens: &written[prompt][written[prompt].len() - 1..],
            paths: &paths[prompt],
        };
        let steps: Vec<Step> = going.iter().map(step).collect();
        if !steps.is_empty() {
            hidden = generator.advance(&mut branches, &steps, threads)?;
        }
        for which in &going {
            let slot = paths[*which][0].len() as u32;
            paths[*which][0].push(slot);
        }
    }
    Ok(written)
}
