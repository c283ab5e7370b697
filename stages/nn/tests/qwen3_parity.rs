//! The inference engine against transformers: a tiny checkpoint and what transformers computes with it.

use std::path::PathBuf;

use grlm_nn::qwen3::{Branches, Prompt, Qwen3, Segment, Step, Wanted};
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

fn prompts(all: &[Vec<u32>]) -> Vec<Prompt<'_>> {
    all.iter().map(|tokens| Prompt { prefix: None, tokens }).collect()
}

#[test]
fn logits_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    for threads in [1, 2] {
        let (_, hidden) = model.read(&prompts(&expected.prompts), Wanted::Last, threads).unwrap();
        assert_close(&model.logits(&hidden, threads).unwrap(), &expected.logits_last.concat(), "all prompts together");
        for (prompt, wanted) in expected.prompts.iter().zip(&expected.logits_last) {
            let (_, hidden) = model.read(&[Prompt { prefix: None, tokens: prompt }], Wanted::Last, threads).unwrap();
            assert_close(&model.logits(&hidden, threads).unwrap(), wanted, "one prompt");
        }
    }
    let (_, hidden) = model.read(&prompts(&expected.prompts[..1]), Wanted::All, 1).unwrap();
    assert_close(&model.logits(&hidden, 1).unwrap(), &expected.logits_all_first.concat(), "every position");
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    let eos = model.config().eos_tokens.clone();
    let (segments, mut hidden) = model.read(&prompts(&expected.prompts), Wanted::Last, 1).unwrap();
    let mut branches: Vec<Branches> = segments.iter().map(|s| Branches::new(model.config(), [s])).collect();
    let mut paths: Vec<Vec<Vec<u32>>> = vec![vec![Vec::new()]; branches.len()];
    let mut written: Vec<Vec<u32>> = vec![Vec::new(); branches.len()];
    for step in 0..expected.greedy[0].len() {
        let logits = model.logits(&hidden, 1).unwrap();
        let best: Vec<u32> = logits
            .chunks(model.config().vocab_size)
            .map(|row| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32)
            .collect();
        for (text, token) in written.iter_mut().zip(&best) {
            text.push(*token);
        }
        let mut steps: Vec<Step> = branches
            .iter_mut()
            .zip(&best)
            .zip(&paths)
            .map(|((branches, token), paths)| Step { branches, tokens: std::slice::from_ref(token), paths })
            .collect();
        hidden = model.step(&mut steps, 1).unwrap();
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
    let (_, alone) = model.read(&[Prompt { prefix: None, tokens: prompt }], Wanted::Last, 1).unwrap();
    for (batch, threads) in [(7, 1), (32, 1), (32, 3)] {
        let many: Vec<Vec<u32>> =
            (0..batch).map(|i| if i == batch / 2 { prompt.clone() } else { expected.prompts[i % 5].clone() }).collect();
        let (_, hidden) = model.read(&prompts(&many), Wanted::Last, threads).unwrap();
        assert_eq!(bits(&hidden[batch / 2 * width..][..width]), bits(&alone), "batch of {batch}, {threads} threads");
    }
    for cut in [1, 5, 32] {
        let (prefix, _) = model.read(&[Prompt { prefix: None, tokens: &prompt[..cut] }], Wanted::Last, 1).unwrap();
        let rest = Prompt { prefix: Some(&prefix[0]), tokens: &prompt[cut..] };
        let (_, hidden) = model.read(&[rest], Wanted::Last, 1).unwrap();
        assert_eq!(bits(&hidden), bits(&alone), "a beginning of {cut} tokens");
    }
}

#[test]
fn beams_do_not_depend_on_their_batch() {
    let Some((model, expected)) = golden() else { return };
    let step = |count: usize, threads: usize| -> Vec<Vec<u32>> {
        let many: Vec<Vec<u32>> = (0..count).map(|i| expected.prompts[(i + 3) % 5].clone()).collect();
        let (segments, _): (Vec<Segment>, _) = model.read(&prompts(&many), Wanted::Last, threads).unwrap();
        let mut branches: Vec<Branches> = segments.iter().map(|s| Branches::new(model.config(), [s])).collect();
        let tokens: Vec<u32> = (0..4).map(|i| 40 + i).collect();
        let mut last = Vec::new();
        for depth in 0..3u32 {
            // Every beam goes on from the beam beside it.
            let paths: Vec<Vec<u32>> =
                (0..4).map(|beam| (0..depth).map(|d| 4 * d + (beam + d + 1) % 4).collect()).collect();
            let mut steps: Vec<Step> =
                branches.iter_mut().map(|branches| Step { branches, tokens: &tokens, paths: &paths }).collect();
            last = model.step(&mut steps, threads).unwrap();
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
    let error = |tokens: &[u32]| {
        model.read(&[Prompt { prefix: None, tokens }], Wanted::Last, 1).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(error(&[]), "a prompt has no tokens");
    assert_eq!(error(&[512]), "token 512 is not among the model's 512");
    assert!(error(&vec![3; 4097]).contains("4096 positions"));
}
