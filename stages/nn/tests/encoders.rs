//! Encoders against transformers: random models of MiniLM's, RoBERTa's and Qwen3-Embedding's build with tokenizers, and
//! the vectors that transformers makes of 200 titles (`scripts/fixtures/encoders.py` wrote both).

use std::{
    fs,
    path::{Path, PathBuf},
};

use grlm_nn::{
    encoder::{Encoder, Pooling},
    qwen3::{FloatType, Place},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const LEAST_COSINE: f32 = 0.99999;
/// As the script has it: some of the titles are longer.
const MAX_TOKENS: usize = 48;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders")
}

fn titles() -> Vec<String> {
    let titles: Vec<String> =
        fs::read_to_string(fixtures().join("titles.txt")).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(titles.len(), 200);
    titles
}

fn encoder(name: &str, pooling: Option<Pooling>) -> Encoder {
    Encoder::load(&fixtures().join(name), pooling, MAX_TOKENS).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn vectors_are_those_of_transformers() {
    let titles = titles();
    for (name, pooling, file) in [
        ("bert", Pooling::Mean, "bert.mean.f32"),
        ("bert", Pooling::Cls, "bert.cls.f32"),
        ("roberta", Pooling::Mean, "roberta.mean.f32"),
        ("qwen3", Pooling::Last, "qwen3.last.f32"),
        ("qwen3", Pooling::Mean, "qwen3.mean.f32"),
    ] {
        let encoder = encoder(name, Some(pooling));
        let bytes = fs::read(fixtures().join(file)).unwrap();
        let expected: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let vectors = encoder.encode(&titles, 2).unwrap();
        let mut others = 0.0;
        for (i, (vector, expected)) in vectors.iter().zip(expected.chunks(encoder.width())).enumerate() {
            let found = cosine(vector, expected);
            assert!(found >= LEAST_COSINE, "{file}, `{}`: {found}", titles[i]);
            others += cosine(vector, &vectors[(i + 7) % vectors.len()]);
        }
        // Vectors that were all alike would prove nothing.
        assert!(others / 200.0 < 0.9, "{file}: {others}");
    }
}

/// What computes on GPUs, on candle's CPU device, or with `GRLM_TEST_GPU` on the first of them.
#[test]
fn vectors_of_a_device_are_those_of_the_cpu() {
    let titles = titles();
    for (name, pooling) in [("bert", Pooling::Cls), ("roberta", Pooling::Mean), ("qwen3", Pooling::Last)] {
        let wanted = encoder(name, Some(pooling)).encode(&titles, 2).unwrap();
        for (dtype, least) in [(FloatType::F32, LEAST_COSINE), (FloatType::F16, 0.999), (FloatType::Bf16, 0.99)] {
            let place = match std::env::var_os("GRLM_TEST_GPU") {
                Some(_) => Place::Cuda { device: 0, dtype },
                None => Place::CpuTensors { dtype },
            };
            let encoder = Encoder::load_on(&fixtures().join(name), Some(pooling), MAX_TOKENS, place).unwrap();
            // Groups of a few texts, of unequal length.
            let found = encoder.with_tokens_at_once(5 * MAX_TOKENS).encode(&titles, 1).unwrap();
            let cosines = found.iter().zip(&wanted).map(|(found, wanted)| cosine(found, wanted));
            let worst = cosines.fold(1.0, f32::min);
            assert!(worst >= least, "{name}, {pooling:?}, {dtype:?}: {worst}");
        }
    }
}

#[test]
fn a_vector_does_not_depend_on_its_batch() {
    let titles = titles();
    for name in ["bert", "qwen3"] {
        let encoder = encoder(name, None);
        let all = encoder.encode(&titles, 1).unwrap();
        for (batch, threads) in [(1, 1), (7, 1), (32, 2), (200, 3)] {
            for (part, expected) in titles.chunks(batch).zip(all.chunks(batch)) {
                for (vector, expected) in encoder.encode(part, threads).unwrap().iter().zip(expected) {
                    assert_eq!(bits(vector), bits(expected), "{name}, batches of {batch}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn pooling_is_the_models_own_unless_given() {
    assert_eq!(encoder("bert", None).pooling(), Pooling::Mean);
    assert_eq!(encoder("qwen3", None).pooling(), Pooling::Last);
    assert_eq!(encoder("qwen3", Some(Pooling::Cls)).pooling(), Pooling::Cls);
}

#[test]
fn long_texts_are_cut_with_their_special_tokens_kept() {
    let long = "word ".repeat(500);
    let qwen3 = encoder("qwen3", None).tokens(&long).unwrap();
    assert_eq!((qwen3.len(), qwen3.last()), (MAX_TOKENS, Some(&0)));
    let bert = encoder("bert", None).tokens(&long).unwrap();
    assert_eq!((bert.len(), bert.first(), bert.last()), (MAX_TOKENS, Some(&2), Some(&3)));
    // Never more than the model has positions.
    let wide = Encoder::load(&fixtures().join("bert"), None, 10_000).unwrap();
    assert_eq!(wide.tokens(&long).unwrap().len(), 64);
    let narrow = Encoder::load(&fixtures().join("bert"), None, 2).err().unwrap();
    assert_eq!(narrow.to_string(), "2 tokens have no room for a text");
}

#[test]
fn a_folder_that_is_not_whole_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(fixtures().join("bert").join(name), folder.path().join(name)).unwrap();
    let error = || Encoder::load(folder.path(), None, 48).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error().contains("config.json"), "{}", error());
    copy("config.json");
    assert!(error().contains("model.safetensors"), "{}", error());
    copy("model.safetensors");
    assert!(error().contains("tokenizer.json"), "{}", error());
    copy("tokenizer.json");
    assert_eq!(error(), "");
    let config = fs::read_to_string(folder.path().join("config.json")).unwrap();
    fs::write(
        folder.path().join("config.json"),
        config.replace("\"intermediate_size\": 192", "\"intermediate_size\": 96"),
    )
    .unwrap();
    assert!(error().contains("has the shape [192, 48], and config.json makes it [96, 48]"), "{}", error());
    fs::write(
        folder.path().join("config.json"),
        config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
    )
    .unwrap();
    assert!(error().contains("the weights have 2 layers, and config.json says 1"), "{}", error());
    fs::rename(folder.path().join("model.safetensors"), folder.path().join("pytorch_model.bin")).unwrap();
    assert!(error().contains("pytorch_model.bin, which is not read"), "{}", error());
}

/// Copies a fixture with its last norm in `dtype`, every byte of it 255.
fn with_last_norm(name: &str, norm: &str, dtype: Dtype, folder: &Path) {
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(fixtures().join(name).join(file), folder.join(file)).unwrap();
    }
    let bytes = fs::read(fixtures().join(name).join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let junk = vec![255; 8 * 1024];
    let views = stored.iter().map(|(tensor, view)| {
        if tensor != norm {
            return (tensor, view);
        }
        let size = view.shape().iter().product::<usize>() * dtype.bitsize() / 8;
        (tensor, TensorView::new(dtype, view.shape().to_vec(), &junk[..size]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn weights_that_are_no_numbers_or_of_another_type_are_told() {
    let folder = tempfile::tempdir().unwrap();
    for (name, norm) in [("qwen3", "norm.weight"), ("bert", "encoder.layer.1.output.LayerNorm.weight")] {
        for place in [Place::Cpu, Place::CpuTensors { dtype: FloatType::F32 }] {
            with_last_norm(name, norm, Dtype::F32, folder.path());
            let encoder = Encoder::load_on(folder.path(), None, MAX_TOKENS, place).unwrap();
            let error = encoder.encode(&["a relay"], 1).err().map(|e| e.to_string());
            assert_eq!(error.as_deref(), Some("the model computes NaN or infinity"), "{name}, {place:?}");
            with_last_norm(name, norm, Dtype::F64, folder.path());
            let error = Encoder::load_on(folder.path(), None, MAX_TOKENS, place).err().map(|e| e.to_string());
            assert!(error.as_deref().is_some_and(|e| e.ends_with("is stored as F64")), "{name}: {error:?}");
        }
    }
}
