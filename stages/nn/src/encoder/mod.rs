//! Encoders: from texts to unit vectors, by a model folder in Hugging Face's layout.
//!
//! Two networks: a Qwen3 (Qwen3-Embedding: causal, its last token's vector is the text's) and a BERT (sentence
//! encoders). Tokens, with the special ones, are what the folder's `tokenizer.json` makes of a text; its
//! post-processor is what appends Qwen3-Embedding's end token. On the CPU a text's vector is the same bits in any
//! batch and on any number of threads.

use std::{fs, path::Path};

use rayon::prelude::*;
use tokenizers::{Tokenizer, TruncationParams};

use crate::{
    Error,
    parts::parts,
    qwen3::{Place, Qwen3, Room, Wanted, weights::Weights},
};

mod bert;
mod bert_tensors;
mod config;
pub mod memory;
mod settings;

use bert::Bert;
use bert_tensors::BertTensors;
pub use config::{Activation, BertConfig};

/// Tokens that one thread takes through the network together: enough for the products to run at full speed, few
/// enough for what lies between them to stay in the cache.
pub const TOKENS_AT_ONCE: usize = 512;
/// The same for a GPU, which small products leave idle, and padding included; fewer where its memory is small.
const TOKENS_ON_DEVICE: usize = 16_384;

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean, special tokens included.
    Mean,
    /// The last one.
    Last,
    /// The first one.
    Cls,
}

/// An encoder ready to embed.
pub struct Encoder {
    network: Network,
    tokenizer: Tokenizer,
    pooling: Pooling,
    /// Tokens of the longest text.
    longest: usize,
    tokens_at_once: usize,
    on_device: bool,
}

enum Network {
    Qwen3(Box<Qwen3>),
    Bert(Box<Bert>),
    BertTensors(Box<BertTensors>),
}

/// Loads a BERT's folder; also gives the tokens of its longest text.
fn open_bert(folder: &Path, place: Place) -> Result<(Network, usize), Error> {
    let config = BertConfig::load(folder)?;
    let weights = Weights::map(folder)?
        .inside(&["bert.", "roberta.", "model.", "0.auto_model."], "embeddings.word_embeddings.weight");
    weights.check(config.tensors())?;
    weights.check_layers(config.layers)?;
    let longest = config.max_tokens();
    let network = match place.device()? {
        None => Network::Bert(Box::new(Bert::load(config, &weights)?)),
        Some((device, _)) => Network::BertTensors(Box::new(BertTensors::load(config, &weights, &device)?)),
    };
    Ok((network, longest))
}

impl Encoder {
    /// Loads a model folder. Texts will be cut to `max_tokens`, special ones included, or to the model's positions.
    /// Without a `pooling`, it is what the folder says, else the last token of a Qwen3 and the mean of a BERT. Runs on
    /// the current rayon pool.
    ///
    /// # Errors
    /// A file is missing, damaged or contradicts another; the architecture, or how it embeds, is not known here;
    /// `max_tokens` has no room for a text beside special tokens.
    pub fn load(folder: &Path, pooling: Option<Pooling>, max_tokens: usize) -> Result<Self, Error> {
        Self::load_on(folder, pooling, max_tokens, Place::Cpu)
    }

    /// [`Encoder::load`], to compute in `place`.
    ///
    /// # Errors
    /// As [`Encoder::load`] and [`Qwen3::load_on`].
    pub fn load_on(folder: &Path, pooling: Option<Pooling>, max_tokens: usize, place: Place) -> Result<Self, Error> {
        let named = match pooling {
            Some(pooling) => Some(pooling),
            None => settings::pooling(folder)?,
        };
        let (network, default, positions) = if is_qwen3(folder)? {
            let model = Qwen3::load_encoder(folder, place)?;
            let positions = model.config().max_positions;
            (Network::Qwen3(Box::new(model)), Pooling::Last, positions)
        } else {
            let (network, positions) = open_bert(folder, place)?;
            (network, Pooling::Mean, positions)
        };
        let longest = max_tokens.min(positions);
        let tokenizer = tokenizer(folder, longest)?;
        let pooling = named.unwrap_or(default);
        let on_device = match &network {
            Network::Qwen3(model) => model.is_on_device(),
            Network::Bert(_) => false,
            Network::BertTensors(_) => true,
        };
        let tokens_at_once = match &network {
            Network::Qwen3(model) if on_device => memory::tokens_on_device(model, longest),
            Network::BertTensors(_) => TOKENS_ON_DEVICE,
            _ => TOKENS_AT_ONCE,
        };
        Ok(Self { network, tokenizer, pooling, longest, tokens_at_once, on_device })
    }

    /// Lets a thread take so many tokens (or one text) through the network together; fewer take less memory, and
    /// change no result.
    pub fn with_tokens_at_once(mut self, tokens: usize) -> Self {
        self.tokens_at_once = tokens.max(1);
        self
    }

    /// Whether tensors on a device compute it, where a thread's memory is not what counts.
    pub fn is_on_device(&self) -> bool {
        self.on_device
    }

    /// What a thread has in memory beside the weights, with so many tokens at once; in bytes.
    pub fn bytes_of_work(&self, tokens_at_once: usize) -> usize {
        match &self.network {
            Network::Qwen3(model) => memory::qwen3_work(model.config(), tokens_at_once, self.longest),
            Network::Bert(model) => memory::bert_work(model.config(), tokens_at_once, self.longest),
            Network::BertTensors(model) => memory::bert_work(model.config(), tokens_at_once, self.longest),
        }
    }

    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Elements of a vector.
    pub fn width(&self) -> usize {
        match &self.network {
            Network::Qwen3(model) => model.config().hidden_size,
            Network::Bert(model) => model.config().hidden_size,
            Network::BertTensors(model) => model.config().hidden_size,
        }
    }

    /// The tokens of a text: special ones added, cut to the length that was asked for.
    ///
    /// # Errors
    /// The tokenizer cannot take the text (a broken `tokenizer.json`).
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode_fast(text, true);
        let encoding = encoding.map_err(|e| Error::argument(format!("the tokenizer cannot take a text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The vector of each text, of length 1 (of zeros for a text without any tokens). Runs on the current rayon pool,
    /// which should have `threads`.
    ///
    /// # Errors
    /// As [`Encoder::tokens`]; a token that the model has not.
    pub fn encode<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<Vec<f32>>, Error> {
        let tokens: Vec<Vec<u32>> = texts.par_iter().map(|t| self.tokens(t.as_ref())).collect::<Result<_, _>>()?;
        if self.on_device {
            let groups = parts(&tokens, self.tokens_at_once, true, Vec::len);
            let vectors = groups.map(|group| self.embed(group, 1)).collect::<Result<Vec<_>, _>>()?;
            return Ok(vectors.into_iter().flatten().collect());
        }
        let groups = groups(&tokens, threads, self.tokens_at_once);
        // One thread a group wastes nothing; only a lone group is worth the others' help.
        let each = if groups.len() < threads { threads } else { 1 };
        let vectors: Vec<Vec<Vec<f32>>> =
            groups.par_iter().map(|group| self.embed(group, each)).collect::<Result<_, _>>()?;
        Ok(vectors.into_iter().flatten().collect())
    }

    fn embed(&self, texts: &[Vec<u32>], threads: usize) -> Result<Vec<Vec<f32>>, Error> {
        let width = self.width();
        let present: Vec<&[u32]> = texts.iter().map(Vec::as_slice).filter(|t| !t.is_empty()).collect();
        let last_only = self.pooling == Pooling::Last;
        let (vectors, one_each) = match &self.network {
            Network::Bert(model) => (model.read(&present, threads)?, false),
            Network::BertTensors(model) => (model.read(&present)?, false),
            Network::Qwen3(model) => {
                let wanted = if last_only { Wanted::Last } else { Wanted::All };
                let mut branches = model.branches(None, Room::of(&present, 0))?;
                (model.read(&mut branches, &present, wanted, threads)?, last_only)
            }
        };
        if vectors.iter().any(|x| !x.is_finite()) {
            return Err(Error::NotFinite);
        }
        let mut at = 0;
        let of_text = |tokens: &Vec<u32>| {
            if tokens.is_empty() {
                return vec![0.0; width];
            }
            let rows = if one_each { 1 } else { tokens.len() };
            let own = &vectors[at * width..(at + rows) * width];
            at += rows;
            unit(pool(own, width, self.pooling))
        };
        Ok(texts.iter().map(of_text).collect())
    }
}

/// Parts of at most `at_once` tokens, or of one text, and enough of them for all threads.
fn groups(texts: &[Vec<u32>], threads: usize, at_once: usize) -> Vec<&[Vec<u32>]> {
    let total: usize = texts.iter().map(Vec::len).sum();
    let limit = at_once.min(total.div_ceil(threads.max(1)));
    parts(texts, limit, false, Vec::len).collect()
}

/// One vector of a text's tokens', `[tokens, width]`.
fn pool(vectors: &[f32], width: usize, pooling: Pooling) -> Vec<f32> {
    let rows = vectors.len() / width;
    match pooling {
        Pooling::Cls => vectors[..width].to_vec(),
        Pooling::Last => vectors[(rows - 1) * width..].to_vec(),
        Pooling::Mean => {
            let mut sum = vec![0.0f32; width];
            for row in vectors.chunks_exact(width) {
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            sum.iter_mut().for_each(|x| *x /= rows as f32);
            sum
        }
    }
}

/// The vector divided by its Euclidean length; zeros stay zeros.
pub fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

/// Whether `config.json` is a Qwen3's.
fn is_qwen3(folder: &Path) -> Result<bool, Error> {
    let path = folder.join("config.json");
    let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| {
        Error::model(&path, format!("not valid JSON: {e}")).help("the file may be cut short; copy it again")
    })?;
    Ok(value["model_type"] == "qwen3")
}

/// The folder's tokenizer, which cuts texts to `max_tokens` and pads nothing.
fn tokenizer(folder: &Path, max_tokens: usize) -> Result<Tokenizer, Error> {
    let path = folder.join("tokenizer.json");
    let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let broken = |e: tokenizers::Error| {
        Error::model(&path, format!("not a tokenizer: {e}")).help("the file may be cut short; copy it again")
    };
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(broken)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(broken)?;
    let special = tokenizer.encode_fast("", true).map_err(broken)?.len();
    if max_tokens <= special {
        return Err(Error::argument(format!("{max_tokens} tokens have no room for a text"))
            .help(format!("the model's special tokens alone are {special}; raise `max_tokens`")));
    }
    let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(broken)?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pooling_by_hand() {
        let vectors = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0];
        assert_eq!(pool(&vectors, 2, Pooling::Cls), [1.0, 2.0]);
        assert_eq!(pool(&vectors, 2, Pooling::Last), [5.0, 9.0]);
        assert_eq!(pool(&vectors, 2, Pooling::Mean), [3.0, 5.0]);
        assert_eq!(unit(vec![3.0, 4.0]), [0.6, 0.8]);
        assert_eq!(unit(vec![0.0, 0.0]), [0.0, 0.0]);
    }

    #[test]
    fn groups_hold_all_texts_in_order() {
        let texts: Vec<Vec<u32>> = [600, 10, 500, 2, 0, 511, 1, 1].iter().map(|n| vec![0; *n]).collect();
        let lengths = |threads| groups(&texts, threads, 512).iter().map(|g| g.len()).collect::<Vec<_>>();
        assert_eq!(lengths(1), [1, 4, 2, 1]);
        assert_eq!(groups(&texts[1..4], 4, 512).len(), 3);
        assert!(groups(&[], 2, 512).is_empty());
    }
}
