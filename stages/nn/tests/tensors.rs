//! What computes on GPUs beside what computes on the CPU. candle's tensors run on the CPU too, so that all of it is
//! tested without a GPU; `scripts/gpu_check` sets `GRLM_TEST_GPU`, and the same tests run on the first one.

use std::path::{Path, PathBuf};

use grlm_nn::{
    generate::{Asked, Catalogue, Found, Free, Generator, Normalize, Trie, exact, greedy},
    qwen3::{FloatType, Place, Qwen3, Room, Segment, Step, Wanted},
};
use serde_json::Value;

#[path = "common/tiny.rs"]
mod tiny;
use tiny::{Noise, made_up, tids};

const TOLERANCE: f32 = 1e-4;

fn place(dtype: FloatType) -> Place {
    match std::env::var_os("GRLM_TEST_GPU") {
        Some(_) => Place::Cuda { device: 0, dtype },
        None => Place::CpuTensors { dtype },
    }
}

/// In parts of a few tokens, so that joints between parts are tested too.
fn on_device(folder: &Path) -> Qwen3 {
    Qwen3::load_on(folder, place(FloatType::F32)).unwrap().in_small_parts()
}

fn worst(got: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(got.len(), wanted.len());
    got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The hidden states of prompts.
fn read(model: &Qwen3, prompts: &[&[u32]], wanted: Wanted) -> Vec<f32> {
    let mut branches = model.branches(None, Room::of(prompts, 0)).unwrap();
    model.read(&mut branches, prompts, wanted, 1).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn logits_texts_and_beams_equal_those_of_transformers() {
    let Some(root) = std::env::var_os("GRLM_TEST_DATA") else {
        eprintln!("skipped: GRLM_TEST_DATA is not set");
        return;
    };
    let folder = PathBuf::from(root).join("golden/qwen3_tiny");
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let model = on_device(&folder);
    let prompts: Vec<Vec<u32>> = numbers(&expected["prompts"]);
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let hidden = read(&model, &prompts, Wanted::Last);
    let last: Vec<Vec<f32>> = numbers(&expected["logits_last"]);
    assert!(worst(&model.logits(&hidden, 1).unwrap(), &last.concat()) <= TOLERANCE);
    let hidden = read(&model, &prompts[..1], Wanted::All);
    let all: Vec<Vec<f32>> = numbers(&expected["logits_all_first"]);
    assert!(worst(&model.logits(&hidden, 1).unwrap(), &all.concat()) <= TOLERANCE);

    let ends = model.config().eos_tokens.clone();
    let until_end = |text: &[u32]| text.iter().position(|t| ends.contains(t)).map_or(text.len(), |end| end + 1);
    let generator = Generator::new(&model, 2);
    let texts = greedy(&generator, &prompts, 12, |text| text.last().is_some_and(|t| ends.contains(t))).unwrap();
    let wanted: Vec<Vec<u32>> = numbers(&expected["greedy"]);
    for (text, wanted) in texts.iter().zip(&wanted) {
        assert_eq!(text, &wanted[..until_end(wanted)]);
    }
    for (name, beams, max_new) in [("4x8", 4, 8), ("20x12", 20, 12)] {
        let search = Free { beams, max_new, length_penalty: 1.0, ends: ends.clone() };
        let found = search.search(&generator, &prompts).unwrap();
        for (found, wanted) in found.iter().zip(expected["beams"][name].as_array().unwrap()) {
            for (beam, wanted) in found.iter().zip(wanted.as_array().unwrap()) {
                let tokens: Vec<u32> = numbers(&wanted["tokens"]);
                assert_eq!(beam.tokens, tokens[..until_end(&tokens)], "{name}");
                assert!((beam.score - wanted["score"].as_f64().unwrap() as f32).abs() <= TOLERANCE, "{name}");
            }
        }
    }
}

/// A catalogue is searched with a shared beginning, in a batch of unequal prompts, as the CPU's own kernels search it.
#[test]
fn searches_of_a_catalogue_equal_those_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = made_up(folder.path());
    let model = on_device(folder.path());
    let entries = tids(300, 200);
    let trie = Trie::new(&entries).unwrap();
    let mut noise = Noise(11);
    let beginning = noise.tokens(21, 200);
    let prompts: Vec<Vec<u32>> = [1, 30, 7, 70, 2].iter().map(|length| noise.tokens(*length, 200)).collect();
    let left_out: Vec<u32> = (0..40).collect();
    for normalize in [Normalize::Full, Normalize::Allowed] {
        let search = Catalogue { trie: &trie, beams: 20, normalize, length_penalty: 0.0 };
        let asked: Vec<Asked> = prompts
            .iter()
            .enumerate()
            .map(|(i, tokens)| Asked { tokens, left_out: if i % 2 == 0 { &left_out } else { &[] } })
            .collect();
        let found = |model| {
            let generator = Generator::new(model, 1).with_prefix(&beginning).unwrap();
            search.search(&generator, &asked).unwrap()
        };
        let entries_of = |list: &[Found]| list.iter().map(|f| f.entry).collect::<Vec<_>>();
        for (got, wanted) in found(&model).iter().zip(&found(&cpu)) {
            assert_eq!(entries_of(got), entries_of(wanted), "{normalize:?}");
            let scores = |list: &[Found]| list.iter().map(|f| f.score).collect::<Vec<_>>();
            assert!(worst(&scores(got), &scores(wanted)) <= TOLERANCE, "{normalize:?}");
        }
        let all = |model| {
            let generator = Generator::new(model, 1);
            exact(&generator, &beginning, &[&prompts[1]], &entries, normalize, 1.0).unwrap().concat()
        };
        assert!(worst(&all(&model), &all(&cpu)) <= TOLERANCE, "{normalize:?}");
    }
}

/// How many tokens the beams of each of five prompts take in each step.
const TAKEN: [[usize; 5]; 5] = [[3, 3, 3, 3, 3], [2, 0, 4, 0, 1], [0, 1, 0, 0, 9], [1, 1, 0, 1, 1], [0, 4, 0, 0, 0]];

/// Takes the beams of `which` prompts together through all of [`TAKEN`]; returns the hidden states of each prompt.
fn walk(model: &Qwen3, prefix: Option<&Segment>, prompts: &[Vec<u32>], which: &[usize], slots: usize) -> Vec<Vec<f32>> {
    let asked: Vec<&[u32]> = which.iter().map(|prompt| prompts[*prompt].as_slice()).collect();
    let mut branches = model.branches(prefix, Room::of(&asked, slots)).unwrap();
    let width = model.config().hidden_size;
    let mut all: Vec<Vec<f32>> = vec![Vec::new(); which.len()];
    let mut keep = |hidden: Vec<f32>, rows: &mut dyn Iterator<Item = (usize, usize)>| {
        let mut hidden = hidden.chunks(width);
        rows.for_each(|(own, count)| all[own].extend(hidden.by_ref().take(count).flatten()));
        assert!(hidden.next().is_none());
    };
    for (part, some) in asked.chunks(3).enumerate() {
        let hidden = model.read(&mut branches, some, Wanted::All, 1).unwrap();
        keep(hidden, &mut (3 * part..).zip(some.iter().map(|tokens| tokens.len())));
    }
    for (depth, taken) in TAKEN.iter().enumerate() {
        let beams = |own: usize| -> (Vec<u32>, Vec<Vec<u32>>) {
            let before = branches.slots(own) as u32;
            let path = |row: u32| {
                // Every other token goes on from the one beside it.
                let beside = (row % 2 == 1).then(|| before + row - 1);
                (0..before).filter(|slot| !(slot + row).is_multiple_of(3)).chain(beside).collect()
            };
            let rows = 0..taken[which[own]] as u32;
            (rows.clone().map(|row| (depth as u32 * 40 + row * 7) % 200).collect(), rows.map(path).collect())
        };
        let beams: Vec<_> = (0..which.len()).map(beams).collect();
        let all = beams.iter().enumerate().map(|(prompt, (tokens, paths))| Step { prompt, tokens, paths });
        let steps: Vec<Step> = all.filter(|step| !step.tokens.is_empty()).collect();
        if !steps.is_empty() {
            let hidden = model.step(&mut branches, &steps, 1).unwrap();
            keep(hidden, &mut steps.iter().map(|step| (step.prompt, step.tokens.len())));
        }
    }
    all
}

/// Prompts of one batch are unequal, are read in two parts, and some of their beams rest while others go on.
#[test]
fn a_batch_equals_each_prompt_alone() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = made_up(folder.path());
    let whole = Qwen3::load_on(folder.path(), place(FloatType::F32)).unwrap();
    let mut noise = Noise(21);
    let beginning = noise.tokens(19, 200);
    let prompts: Vec<Vec<u32>> = [7, 30, 1, 2, 70].iter().map(|length| noise.tokens(*length, 200)).collect();
    for with_prefix in [false, true] {
        let walks = |model: &Qwen3, which: &[usize], slots| {
            let prefix = with_prefix.then(|| model.segment(&beginning, 1).unwrap().0);
            walk(model, prefix.as_ref(), &prompts, which, slots)
        };
        let wanted = walks(&cpu, &[0, 1, 2, 3, 4], 20);
        for model in [&whole, &on_device(folder.path())] {
            // Memory for what is generated is taken at once, or grows.
            for slots in [20, 0] {
                for (got, wanted) in walks(model, &[0, 1, 2, 3, 4], slots).iter().zip(&wanted) {
                    assert!(worst(got, wanted) <= TOLERANCE);
                }
            }
        }
        for (prompt, wanted) in wanted.iter().enumerate() {
            assert_eq!(&walks(&cpu, &[prompt], 0)[0], wanted, "on the CPU to the last bit");
            assert!(worst(&walks(&whole, &[prompt], 0)[0], wanted) <= TOLERANCE);
        }
    }
}

#[test]
fn shorter_floats_come_close() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = made_up(folder.path());
    let tokens = Noise(3).tokens(40, 200);
    let logits = |model: &Qwen3| model.logits(&read(model, &[&tokens], Wanted::All), 1).unwrap();
    let wanted = logits(&cpu);
    let largest = wanted.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    // Eight and eleven bits of a number, a few layers deep.
    for (dtype, share) in [(FloatType::Bf16, 0.05), (FloatType::F16, 0.01)] {
        let got = logits(&Qwen3::load_on(folder.path(), place(dtype)).unwrap());
        let apart = worst(&got, &wanted);
        assert!(apart > 0.0 && apart < share * largest, "{dtype:?}: {apart} apart, of {largest}");
    }
}

#[test]
fn what_is_not_there_is_said() {
    let folder = tempfile::tempdir().unwrap();
    made_up(folder.path());
    let load = |device| Qwen3::load_on(folder.path(), Place::Cuda { device, dtype: FloatType::F32 });
    let error = load(1000).err().unwrap().to_string();
    if cfg!(feature = "cuda") {
        assert!(error.contains("GPU 1000 cannot be used"), "{error}");
    } else {
        assert!(error.contains("built without CUDA"), "{error}");
    }
    let encoder = Qwen3::load_encoder(folder.path(), place(FloatType::F32)).unwrap();
    let hidden = read(&encoder, &[&[1, 2]], Wanted::Last);
    assert!(encoder.logits(&hidden, 1).unwrap_err().to_string().contains("no output head"));
}
