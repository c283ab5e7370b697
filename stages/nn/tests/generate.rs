//! Decoding against transformers' own, against exact scores, and against itself in other batches.

use std::path::PathBuf;

use grlm_nn::{
    generate::{Asked, Catalogue, Found, Free, Generator, Normalize, Trie, exact, greedy},
    qwen3::Qwen3,
};
use serde::Deserialize;

#[path = "common/tiny.rs"]
mod tiny;
use tiny::{Noise, made_up, tids};

const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
    beams: std::collections::BTreeMap<String, Vec<Vec<Beam>>>,
}

#[derive(Deserialize)]
struct Beam {
    tokens: Vec<u32>,
    score: f32,
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

fn slices(prompts: &[Vec<u32>]) -> Vec<&[u32]> {
    prompts.iter().map(Vec::as_slice).collect()
}

#[test]
fn beams_and_scores_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    let ends = model.config().eos_tokens.clone();
    for (name, beams, max_new) in [("4x8", 4, 8), ("20x12", 20, 12)] {
        let search = Free { beams, max_new, length_penalty: 1.0, ends: ends.clone() };
        let prompts = slices(&expected.prompts);
        let generator = Generator::new(&model, 1);
        let together = search.search(&generator, &prompts).unwrap();
        let one_by_one: Vec<_> = prompts.iter().map(|p| search.search(&generator, &[p]).unwrap().remove(0)).collect();
        assert_eq!(together, one_by_one, "{name}: unequal prompts in one batch");
        for (prompt, (got, wanted)) in together.iter().zip(&expected.beams[name]).enumerate() {
            assert_eq!(got.len(), wanted.len());
            for (rank, (got, wanted)) in got.iter().zip(wanted).enumerate() {
                // What stands after the end is padding.
                let end = wanted.tokens.iter().position(|t| ends.contains(t)).map_or(wanted.tokens.len(), |e| e + 1);
                assert_eq!(got.tokens, wanted.tokens[..end], "{name}, prompt {prompt}, beam {rank}");
                let apart = (got.score - wanted.score).abs();
                assert!(apart <= TOLERANCE, "{name}, prompt {prompt}, beam {rank}: {apart} apart");
                let sum: f32 = got.log_probabilities.iter().sum();
                assert!((sum / end as f32 - got.score).abs() <= TOLERANCE);
            }
        }
    }
}

#[test]
fn greedy_texts_equal_those_of_transformers() {
    let Some((model, expected)) = golden() else { return };
    let ends = model.config().eos_tokens.clone();
    let is_end = |text: &[u32]| text.last().is_some_and(|t| ends.contains(t));
    let wanted: Vec<Vec<u32>> = expected
        .greedy
        .iter()
        .map(|text| text[..text.iter().position(|t| ends.contains(t)).map_or(text.len(), |e| e + 1)].to_vec())
        .collect();
    let prompts = slices(&expected.prompts);
    assert_eq!(greedy(&Generator::new(&model, 1), &prompts, 12, is_end).unwrap(), wanted);
    assert_eq!(greedy(&Generator::new(&model, 2).with_batch(2), &prompts, 12, is_end).unwrap(), wanted);
    for (prompt, wanted) in prompts.iter().zip(&wanted) {
        assert_eq!(&greedy(&Generator::new(&model, 1), &[prompt], 12, is_end).unwrap()[0], wanted);
    }
    assert!(greedy(&Generator::new(&model, 1), &prompts, 0, is_end).unwrap().iter().all(Vec::is_empty));
}

#[test]
fn an_ending_beam_makes_room_for_another() {
    // With many ends among few tokens, beams end all the time: lists stay full, sorted, and without repeats.
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let ends: Vec<u32> = (0..60).collect();
    let search = Free { beams: 6, max_new: 7, length_penalty: 1.0, ends: ends.clone() };
    let texts = &search.search(&Generator::new(&model, 1), &[&[150, 151]]).unwrap()[0];
    assert_eq!(texts.len(), 6);
    assert!(texts.is_sorted_by(|a, b| a.score >= b.score && a.tokens != b.tokens));
    for text in texts {
        let (last, before) = text.tokens.split_last().unwrap();
        assert!(before.iter().all(|t| !ends.contains(t)));
        assert!(ends.contains(last) || text.tokens.len() == 7);
    }
}

fn ranked(scores: &[f32], left_out: &[u32]) -> Vec<Found> {
    let mut all: Vec<Found> = (0u32..)
        .zip(scores)
        .filter(|(entry, _)| !left_out.contains(entry))
        .map(|(entry, score)| Found { entry, score: *score })
        .collect();
    all.sort_by(|a, b| b.score.total_cmp(&a.score));
    all
}

#[test]
fn enough_beams_find_what_exact_scores_find() {
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let tids = tids(400, 200);
    let trie = Trie::new(&tids).unwrap();
    let mut noise = Noise(3);
    let prompts: Vec<Vec<u32>> = [5, 1, 17].iter().map(|n| noise.tokens(*n, 200)).collect();
    for normalize in [Normalize::Full, Normalize::Allowed] {
        for length_penalty in [0.0, 1.0] {
            let generator = Generator::new(&model, 1);
            let exact = exact(&generator, &[], &slices(&prompts), &tids, normalize, length_penalty).unwrap();
            let asked = |left_out| -> Vec<Asked> { prompts.iter().map(|tokens| Asked { tokens, left_out }).collect() };
            let best: Vec<u32> = ranked(&exact[0], &[]).iter().take(3).map(|f| f.entry).collect();
            let (mut found, mut sought) = (0, 0);
            for left_out in [&[][..], &best] {
                let wide = Catalogue { trie: &trie, beams: 400, normalize, length_penalty };
                for (got, exact) in wide.search(&generator, &asked(left_out)).unwrap().iter().zip(&exact) {
                    let wanted = ranked(exact, left_out);
                    assert_eq!(got.len(), wanted.len());
                    for (got, wanted) in got.iter().zip(&wanted).take(20) {
                        assert_eq!(got.entry, wanted.entry, "{normalize:?}, penalty {length_penalty}");
                        assert!((got.score - wanted.score).abs() <= TOLERANCE, "{} {}", got.score, wanted.score);
                    }
                }
                // Few beams may miss some, and score what they find alike.
                let narrow = Catalogue { trie: &trie, beams: 20, normalize, length_penalty };
                for (got, exact) in narrow.search(&generator, &asked(left_out)).unwrap().iter().zip(&exact) {
                    assert_eq!(got.len(), 20);
                    assert!(got.iter().all(|f| !left_out.contains(&f.entry)));
                    assert!(got.iter().all(|f| (f.score - exact[f.entry as usize]).abs() <= TOLERANCE));
                    let top: Vec<u32> = ranked(exact, left_out).iter().take(20).map(|f| f.entry).collect();
                    let shared = got.iter().filter(|f| top.contains(&f.entry)).count();
                    assert!(shared >= 10, "only {shared} of 20 in common");
                    (found, sought) = (found + shared, sought + top.len());
                }
            }
            println!("{normalize:?}, length penalty {length_penalty}: 20 beams find {found} of {sought} that are best");
        }
    }
}

#[test]
fn full_scores_are_those_of_unconstrained_beam_search() {
    // Every text of two tokens is in the catalogue: constrained and unconstrained search are the same search.
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let tids: Vec<Vec<u32>> = (0..200).flat_map(|a| (0..200).map(move |b| vec![a, b])).collect();
    let trie = Trie::new(&tids).unwrap();
    let generator = Generator::new(&model, 1);
    let prompt: &[u32] = &[4, 8, 15];
    let free = Free { beams: 20, max_new: 2, length_penalty: 0.0, ends: Vec::new() };
    let free = &free.search(&generator, &[prompt]).unwrap()[0];
    let catalogue = Catalogue { trie: &trie, beams: 20, normalize: Normalize::Full, length_penalty: 0.0 };
    let found = &catalogue.search(&generator, &[Asked { tokens: prompt, left_out: &[] }]).unwrap()[0];
    let found: Vec<(Vec<u32>, f32)> = found.iter().map(|f| (tids[f.entry as usize].clone(), f.score)).collect();
    let free: Vec<(Vec<u32>, f32)> = free.iter().map(|f| (f.tokens.clone(), f.score)).collect();
    assert_eq!(found, free);
}

#[test]
fn a_result_does_not_depend_on_batch_threads_or_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let tids = tids(300, 200);
    let trie = Trie::new(&tids).unwrap();
    let mut noise = Noise(9);
    let beginning = noise.tokens(11, 200);
    let prompts: Vec<Vec<u32>> = (0..32).map(|i| noise.tokens(1 + i % 40, 200)).collect();
    let free = Free { beams: 5, max_new: 6, length_penalty: 1.0, ends: vec![2] };
    for normalize in [Normalize::Full, Normalize::Allowed] {
        let catalogue = Catalogue { trie: &trie, beams: 10, normalize, length_penalty: 0.0 };
        let decode = |generator: &Generator, prompts: &[Vec<u32>]| {
            let asked: Vec<Asked> = prompts.iter().map(|tokens| Asked { tokens, left_out: &[1, 2, 3] }).collect();
            let found = catalogue.search(generator, &asked).unwrap();
            let texts = free.search(generator, &slices(prompts)).unwrap();
            let greedy = greedy(generator, &slices(prompts), 5, |_| false).unwrap();
            (found, texts, greedy)
        };
        let shared = || Generator::new(&model, 1).with_prefix(&beginning).unwrap();
        let (found, texts, greedy) = decode(&shared(), &prompts);
        for (batch, threads) in [(1, 1), (7, 1), (32, 1), (3, 2), (1, 4)] {
            let generator = Generator::new(&model, threads).with_prefix(&beginning).unwrap().with_batch(batch);
            let got = decode(&generator, &prompts);
            assert_eq!((&got.0, &got.1, &got.2), (&found, &texts, &greedy), "batch {batch}, {threads} threads");
        }
        let whole: Vec<Vec<u32>> = prompts.iter().map(|p| [&beginning[..], p].concat()).collect();
        let got = decode(&Generator::new(&model, 1), &whole);
        assert_eq!((&got.0, &got.1, &got.2), (&found, &texts, &greedy), "without a shared beginning");
        let got = decode(&shared(), &prompts[20..21]);
        assert_eq!((&got.0[0], &got.1[0], &got.2[0]), (&found[20], &texts[20], &greedy[20]), "alone");
    }
}

#[test]
fn nothing_is_found_where_everything_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let trie = Trie::new(&[vec![3, 4], vec![3, 5], vec![6]]).unwrap();
    let generator = Generator::new(&model, 1);
    let catalogue = Catalogue { trie: &trie, beams: 20, normalize: Normalize::Full, length_penalty: 0.0 };
    let asked = [Asked { tokens: &[9], left_out: &[0, 1, 2] }, Asked { tokens: &[9], left_out: &[0] }];
    let found = catalogue.search(&generator, &asked).unwrap();
    assert!(found[0].is_empty());
    let mut entries: Vec<u32> = found[1].iter().map(|f| f.entry).collect();
    entries.sort_unstable();
    assert_eq!(entries, [1, 2]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = made_up(folder.path());
    let generator = Generator::new(&model, 1);
    let trie = Trie::new(&[vec![3, 200]]).unwrap();
    let asked = [Asked { tokens: &[9], left_out: &[] }];
    let search = |beams| Catalogue { trie: &trie, beams, normalize: Normalize::Full, length_penalty: 0.0 };
    let error = search(1).search(&generator, &asked).unwrap_err().to_string();
    assert!(error.contains("token 200"), "{error}");
    assert!(search(0).search(&generator, &asked).unwrap_err().to_string().contains("at least one beam"));
    let free = Free { beams: 0, max_new: 2, length_penalty: 0.0, ends: Vec::new() };
    assert!(free.search(&generator, &[&[9]]).is_err());
    let free = Free { beams: 2, max_new: 300, length_penalty: 0.0, ends: Vec::new() };
    let error = free.search(&generator, &[&[9]]).unwrap_err().to_string();
    assert!(error.contains("256 positions"), "{error}");
}
