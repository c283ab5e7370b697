//! Embedding the texts of a catalogue: one row an item, by a model folder on this machine or by a server that speaks
//! OpenAI's `/v1/embeddings`.

use std::path::{Path, PathBuf};

use grlm_nn::encoder::{self, Encoder};
use serde_json::{Map, Value, json};

use super::{EmbeddingModel, MAX_TOKENS, Pooling};
use crate::{
    StageContext, StageError, artifact,
    compute::{CPU, PerDevice},
    endpoint::{CallError, Endpoint},
    hub, machine,
    rows::{self, RowDevice, RowFunction, RowJob, RowRecipe, RowResult},
};

const NAMESPACE: &str = "embedding";
/// Raised when the code of this file or of the encoders changes what they compute for a text.
const ROW_VERSION: u32 = 1;
/// Texts that a device gets at a time.
const PIECE: usize = 64;
/// The same for a GPU.
const PIECE_ON_GPU: usize = 1024;
/// Texts in one request.
const PER_REQUEST: usize = 16;

/// The parameter that names the model.
pub const PLACE: &str = "encoder.model";

/// The rows of an embedding: a text each. Where no server is asked, `identity` tells the model apart, and `device` what
/// computes ([`Dtype::key`](crate::compute::Dtype::key)).
pub fn job(model: &EmbeddingModel, identity: &str, device: &str, texts: &[String]) -> RowJob {
    let recipe = RowRecipe::new(NAMESPACE, ROW_VERSION);
    let recipe = match &model.endpoint {
        // Not the address: the same model elsewhere is the same.
        Some(_) => recipe
            .text("served", &model.model)
            .text("revision", model.revision.as_deref().unwrap_or_default())
            .json("extra", &Value::Object(model.extra_body.clone())),
        None => {
            let settings = json!({"pooling": model.pooling, "max_tokens": model.max_tokens, "device": device});
            recipe.text("model", identity).json("settings", &settings)
        }
    };
    let keys = texts.iter().map(|text| recipe.row().text("text", text).key()).collect();
    let costs = texts.iter().map(|text| text.len() as u64).collect();
    let job = RowJob::new(NAMESPACE, "item", keys).costs(costs);
    match &model.endpoint {
        Some(_) => job.batch(PER_REQUEST).requests(model.concurrency),
        None => job.batch(if device == CPU { PIECE } else { PIECE_ON_GPU }),
    }
}

/// Unit vectors of texts.
pub struct Embedded {
    /// Which texts have one, ascending.
    pub texts: Vec<usize>,
    /// Which have none: the model had no answer.
    pub failed: Vec<usize>,
    /// Which have a vector of zeros, which is near to nothing.
    pub zero: Vec<usize>,
    /// `[texts, width]`.
    pub vectors: Vec<f32>,
    pub width: usize,
}

/// A unit vector for each text, of the item of that name; at most `max_failed_rows` of them may have none.
///
/// # Errors
/// The model cannot be used; too many texts without a vector; vectors that differ in width.
pub fn embed(
    cx: &mut StageContext,
    model: &EmbeddingModel,
    texts: &[String],
    names: Vec<String>,
    max_failed_rows: usize,
) -> Result<Embedded, StageError> {
    let (folder, identity) = match &model.endpoint {
        Some(_) => (PathBuf::new(), String::new()),
        None => (cx.model(PLACE, &model.name())?, cx.model_identity(PLACE, &model.name())?),
    };
    if model.endpoint.is_none() {
        check_pooling(model, &folder)?;
    }
    let job = job(model, &identity, model.dtype.key(cx), texts).names(names).max_failed_rows(max_failed_rows);
    let rows = match &model.endpoint {
        Some(address) => {
            let endpoint = Endpoint::new(address, model.endpoint_settings(), cx.stop_flag());
            let make = |device: RowDevice| {
                endpoint.tell_by(&device.notes);
                Ok(Served { endpoint: &endpoint, model, texts })
            };
            let rows = rows::run(cx, &job, make);
            endpoint.conclude(cx, &job, rows)?
        }
        None => {
            let (threads, out_of_memory) = (cx.threads(), cx.out_of_memory_before());
            let max_tokens = match model.max_tokens {
                Some(tokens) => tokens,
                None => max_tokens_of(&folder)?,
            } as usize;
            let encoders = PerDevice::new(cx);
            let make = |device: RowDevice| {
                let pool = device.pool()?;
                let encoder = encoders.get(device.device, || {
                    let (pooling, place) = (model.pooling.map(Into::into), model.dtype.on(device.device));
                    let load = || Encoder::load_on(&folder, pooling, max_tokens, place);
                    let encoder = pool.install(load)?;
                    if encoder.is_on_device() {
                        return Ok::<_, StageError>(encoder);
                    }
                    let tokens = tokens_at_once(|tokens| encoder.bytes_of_work(tokens), threads, out_of_memory);
                    Ok(encoder.with_tokens_at_once(tokens))
                })?;
                Ok(Local { encoder, folder: &folder, pool, texts })
            };
            rows::run(cx, &job, make)?
        }
    };
    let mut all = Embedded {
        texts: Vec::with_capacity(texts.len()),
        failed: Vec::new(),
        zero: Vec::new(),
        vectors: Vec::new(),
        width: 0,
    };
    for (text, row) in rows.iter().enumerate() {
        let Ok(bytes) = row else {
            all.failed.push(text);
            continue;
        };
        let (values, rest) = bytes.as_chunks::<4>();
        if all.width == 0 {
            all.width = values.len();
        }
        if values.len() != all.width || !rest.is_empty() {
            let (width, other) = (all.width, values.len());
            return Err(StageError::params(format!("the encoder gave vectors of {width} and of {other} numbers"))
                .help("a server may have changed its model; say which it is by `revision`"));
        }
        if values.iter().all(|bytes| f32::from_le_bytes(*bytes) == 0.0) {
            all.zero.push(text);
            continue;
        }
        all.texts.push(text);
        all.vectors.extend(values.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    }
    Ok(all)
}

/// Where texts are cut when nothing is said: where sentence-transformers cuts them, but at 512 tokens at the latest.
fn max_tokens_of(folder: &Path) -> Result<u32, StageError> {
    let path = folder.join("sentence_bert_config.json");
    if !path.exists() {
        return Ok(MAX_TOKENS);
    }
    let settings: Value = serde_json::from_str(&artifact::text::read(&path)?)
        .map_err(|e| artifact::text::json_error(&path, &e, "a JSON object"))?;
    let longest = settings["max_seq_length"].as_u64().and_then(|longest| u32::try_from(longest).ok());
    Ok(longest.map_or(MAX_TOKENS, |longest| longest.clamp(1, MAX_TOKENS)))
}

/// Another program may have left the files out of the hub's cache that say how a model pools: the usual pooling would then
/// be taken for the model's own.
fn check_pooling(model: &EmbeddingModel, folder: &Path) -> Result<(), StageError> {
    let unknown = |file| hub::is_unknown_whether_there(folder, file);
    if model.pooling.is_some() || !unknown("1_Pooling/config.json") || !unknown("modules.json") {
        return Ok(());
    }
    let message =
        format!("`{}` is in the hub's cache in part, and what is there does not say how it pools", model.name());
    Err(StageError::params(message).help("give `pooling`, or let the hub be asked once for the rest"))
}

/// Tokens that each of `threads` threads takes together: fewer where half of the free memory does not hold their
/// `work`, and half as many after every time that memory ran out.
fn tokens_at_once(work: impl Fn(usize) -> usize, threads: usize, out_of_memory: u32) -> usize {
    let mut tokens = (encoder::TOKENS_AT_ONCE >> out_of_memory.min(8)).max(1);
    let Some(free) = machine::available_memory() else { return tokens };
    while tokens > 1 && work(tokens) > free as usize / 2 / threads {
        tokens /= 2;
    }
    tokens
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A model folder on this machine.
struct Local<'a> {
    encoder: &'a Encoder,
    folder: &'a Path,
    pool: rayon::ThreadPool,
    texts: &'a [String],
}

impl RowFunction for Local<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let texts: Vec<&str> = rows.iter().map(|row| self.texts[*row].as_str()).collect();
        let threads = self.pool.current_num_threads();
        let vectors =
            self.pool.install(|| self.encoder.encode(&texts, threads)).map_err(|e| e.of_model(self.folder))?;
        Ok(rows.iter().zip(&vectors).map(|(row, vector)| (*row, Ok(bytes(vector)))).collect())
    }
}

/// A server.
struct Served<'a> {
    endpoint: &'a Endpoint,
    model: &'a EmbeddingModel,
    texts: &'a [String],
}

impl RowFunction for Served<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        match self.endpoint.post("embeddings", self.body(rows), |answer| vectors(answer, rows.len())) {
            Ok(vectors) => Ok(rows.iter().zip(&vectors).map(|(row, vector)| (*row, Ok(bytes(vector)))).collect()),
            // One text may be to blame: too long, or one over which the server stumbles.
            Err(CallError::Refused(_) | CallError::NoAnswer { answered: true, .. }) if rows.len() > 1 => {
                self.each_alone(rows)
            }
            Err(error) => {
                let failure = error.of_one()?;
                Ok(rows.iter().map(|row| (*row, Err(failure.clone()))).collect())
            }
        }
    }
}

impl Served<'_> {
    /// Asks once for each text. Where nothing can be asked any more, what was answered until then.
    fn each_alone(&self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let mut done = Vec::with_capacity(rows.len());
        for row in rows {
            let answer = self.endpoint.post_once("embeddings", self.body(&[*row]), |answer| vectors(answer, 1));
            let result = match answer.map_err(CallError::of_one) {
                Ok(vectors) => Ok(bytes(&vectors.concat())),
                Err(Ok(failure)) => Err(failure),
                // It will be told when the others are asked for.
                Err(Err(_)) if !done.is_empty() => break,
                Err(Err(end)) => return Err(end),
            };
            done.push((*row, result));
        }
        Ok(done)
    }

    fn body(&self, rows: &[usize]) -> Map<String, Value> {
        let texts: Vec<&str> = rows.iter().map(|row| self.texts[*row].as_str()).collect();
        Map::from_iter([
            ("model".to_owned(), json!(self.model.model)),
            ("input".to_owned(), json!(texts)),
            ("encoding_format".to_owned(), json!("float")),
        ])
    }
}

/// The unit vectors of an answer, in the order of the texts.
fn vectors(answer: &Value, wanted: usize) -> Result<Vec<Vec<f32>>, String> {
    let data = answer["data"].as_array().ok_or("no list `data`")?;
    if data.len() != wanted {
        return Err(format!("{} vectors for {wanted} texts", data.len()));
    }
    let mut vectors: Vec<Option<Vec<f32>>> = vec![None; wanted];
    for (place, one) in data.iter().enumerate() {
        let index = one["index"].as_u64().map_or(place, |index| index as usize);
        let numbers = one["embedding"].as_array().ok_or("an `embedding` is not a list of numbers")?;
        let vector: Option<Vec<f32>> = numbers.iter().map(|x| x.as_f64().map(|x| x as f32)).collect();
        let vector = vector.filter(|v| !v.is_empty() && v.iter().all(|x| x.is_finite()));
        let vector = vector.ok_or("an `embedding` is not a list of numbers")?;
        match vectors.get_mut(index) {
            Some(slot @ None) => *slot = Some(encoder::unit(vector)),
            Some(_) => return Err(format!("two vectors of index {index}")),
            None => return Err(format!("a vector of index {index} for {wanted} texts")),
        }
    }
    vectors.into_iter().collect::<Option<_>>().ok_or_else(|| "a vector is missing".into())
}

impl From<Pooling> for encoder::Pooling {
    fn from(pooling: Pooling) -> Self {
        match pooling {
            Pooling::Mean => Self::Mean,
            Pooling::Last => Self::Last,
            Pooling::Cls => Self::Cls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_tokens_are_taken_together_where_memory_is_short() {
        assert_eq!(tokens_at_once(|_| 0, 2, 0), encoder::TOKENS_AT_ONCE);
        assert_eq!(tokens_at_once(|_| 0, 2, 2), encoder::TOKENS_AT_ONCE / 4);
        if machine::available_memory().is_some() {
            assert_eq!(tokens_at_once(|_| usize::MAX, 1, 0), 1);
        }
    }

    #[test]
    fn texts_are_cut_where_the_model_was_trained_to() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(max_tokens_of(folder.path()).unwrap(), 512);
        for (says, wanted) in [(r#"{"max_seq_length": 256}"#, 256), (r#"{"max_seq_length": 32768}"#, 512)] {
            std::fs::write(folder.path().join("sentence_bert_config.json"), says).unwrap();
            assert_eq!(max_tokens_of(folder.path()).unwrap(), wanted);
        }
        std::fs::write(folder.path().join("sentence_bert_config.json"), "{").unwrap();
        assert!(max_tokens_of(folder.path()).is_err());
    }
}
