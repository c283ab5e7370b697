//! The inference engine against transformers: a tiny checkpoint and what transformers computes with it.

use std::path::PathBuf;

use grlm_nn::qwen3::{Branches, Qwen3, Room, Segment, Step, Wanted};
use serde::Deserialize;

const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Vec<u32>>,
    logits_last: Vec<Vec<f32>>,
    logits_all_first: Vec<Vec<f32>>,
    greedy: Vec<Vec<u32>>,
}

fn golden() -> Option<(Qwen3, Expected)> {
    let Some(root) = std::env::var_os("GRLM_TEST_DATA") else {
        eprintln!("skipped: GRLM_TEST_DATA is not set");
        return None;
    };
    let folder = PathBuf::from(root).join("golden/qwen3_tiny");
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    Some((Qwen3::load(&folder).unwrap(), serde_json::from_str(&text).unwrap()))
}

fn assert_close(got: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let worst = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE, "{what}: {worst} apart");
}

fn read<'a>(
    model: &Qwen3,
    prefix: Option<&'a Segment>,
    prompts: &[&[u32]],
    wanted: Wanted,
    threads: usize,
) -> (Branches<'a>, Vec<f32>) {
    let mut branches = model.branches(prefix, Room::of(prompts, 0)).unwrap();
    let hidden = model.read(&mut branches, prompts, wanted, threads).unwrap();
    (branches, hidden)
}

fn slices(all: &[Vec<u32>]) -> Vec<&[u32]> {
    all.iter().map(Vec::as_slice).collect()
}

#[test]
fn logits_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    for threads in [1, 2] {
        let (_, hidden) = read(&model, None, &slices(&expected.prompts), Wanted::Last, threads);
        assert_close(&model.logits(&hidden, threads).unwrap(), &expected.logits_last.concat(), "all prompts together");
        for (prompt, wanted) in expected.prompts.iter().zip(&expected.logits_last) {
            let (_, hidden) = read(&model, None, &[prompt], Wanted::Last, threads);
            assert_close(&model.logits(&hidden, threads).unwrap(), wanted, "one prompt");
        }
    }
    let (_, hidden) = read(&model, None, &[&expected.prompts[0]], Wanted::All, 1);
    assert_close(&model.logits(&hidden, 1).unwrap(), &expected.logits_all_first.concat(), "every position");
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    let eos = model.config().eos_tokens.clone();
    let (mut branches, mut hidden) = read(&model, None, &slices(&expected.prompts), Wanted::Last, 1);
    let mut paths: Vec<Vec<Vec<u32>>> = vec![vec![Vec::new()]; expected.prompts.len()];
    let mut written: Vec<Vec<u32>> = vec![Vec::new(); expected.prompts.len()];
    for step in 0..expected.greedy[0].len() {
        let logits = model.logits(&hidden, 1).unwrap();
        let best: Vec<u32> = logits
            .chunks(model.config().vocab_size)
            .map(|row| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32)
            .collect();
        for (text, token) in written.iter_mut().zip(&best) {
            text.push(*token);
        }
        let all = best.chunks(1).zip(&paths).enumerate();
        let steps: Vec<Step> = all.map(|(prompt, (tokens, paths))| Step { prompt, tokens, paths }).collect();
        hidden = model.step(&mut branches, &steps, 1).unwrap();
        paths.iter_mut().for_each(|p| p[0].push(step as u32));
    }
    for (got, wanted) in written.iter().zip(&expected.greedy) {
        // What stands after the end is padding.
        let length = wanted.iter().position(|t| eos.contains(t)).map_or(wanted.len(), |end| end + 1);
        assert_eq!(got[..length], wanted[..length]);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_row_does_not_depend_on_its_batch_or_on_a_shared_beginning() {
    let Some((model, expected)) = golden() else { return };
    let prompt = &expected.prompts[3];
    let width = model.config().hidden_size;
    let (_, alone) = read(&model, None, &[prompt], Wanted::Last, 1);
    for (batch, threads) in [(7, 1), (32, 1), (32, 3)] {
        let many: Vec<Vec<u32>> =
            (0..batch).map(|i| if i == batch / 2 { prompt.clone() } else { expected.prompts[i % 5].clone() }).collect();
        let (_, hidden) = read(&model, None, &slices(&many), Wanted::Last, threads);
        assert_eq!(bits(&hidden[batch / 2 * width..][..width]), bits(&alone), "batch of {batch}, {threads} threads");
    }
    for cut in [1, 5, 32] {
        let (prefix, _) = model.segment(&prompt[..cut], 1).unwrap();
        let (_, hidden) = read(&model, Some(&prefix), &[&prompt[cut..]], Wanted::Last, 1);
        assert_eq!(bits(&hidden), bits(&alone), "a beginning of {cut} tokens");
    }
}

#[test]
fn beams_do_not_depend_on_their_batch() {
    let Some((model, expected)) = golden() else { return };
    let step = |count: usize, threads: usize| -> Vec<Vec<u32>> {
        let many: Vec<Vec<u32>> = (0..count).map(|i| expected.prompts[(i + 3) % 5].clone()).collect();
        let (mut branches, _) = read(&model, None, &slices(&many), Wanted::Last, threads);
        let tokens: Vec<u32> = (0..4).map(|i| 40 + i).collect();
        let mut last = Vec::new();
        for depth in 0..3u32 {
            // Every beam goes on from the beam beside it.
            let paths: Vec<Vec<u32>> =
                (0..4).map(|beam| (0..depth).map(|d| 4 * d + (beam + d + 1) % 4).collect()).collect();
            let steps: Vec<Step> = (0..count).map(|prompt| Step { prompt, tokens: &tokens, paths: &paths }).collect();
            last = model.step(&mut branches, &steps, threads).unwrap();
        }
        last.chunks(4 * model.config().hidden_size).map(bits).collect()
    };
    let alone = step(1, 1);
    assert_eq!(step(7, 1)[0], alone[0]);
    assert_eq!(step(7, 1)[5], alone[0]);
    assert_eq!(step(32, 2)[30], alone[0]);
}

#[test]
fn prompts_that_the_model_cannot_read_are_refused() {
    let Some((model, _)) = golden() else { return };
    let error = |tokens: &[u32]| model.segment(tokens, 1).err().map(|e| e.to_string()).unwrap_or_default();
    assert_eq!(error(&[]), "a prompt has no tokens");
    assert_eq!(error(&[512]), "token 512 is not among the model's 512");
    assert!(error(&vec![3; 4097]).contains("4096 positions"));
}
