//! A Qwen3's `config.json`: read from what transformers 4 and 5 write, checked, and written back for them.
//!
//! Only what this engine computes is accepted; anything else (another architecture, scaled rotary positions, a
//! sliding window, biases) is one clear error instead of silently different numbers.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Error;

/// The shape of a Qwen3 and the constants of its arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    /// Query heads; each group of `heads / kv_heads` of them shares one head of keys and values.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub max_positions: usize,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tied: bool,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
    pub pad_token: Option<u32>,
    /// The standard deviation with which a model from scratch begins.
    pub initializer_range: f64,
}

/// The shape of Qwen3-0.6B, without special tokens.
impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 1024,
            intermediate_size: 3072,
            layers: 28,
            heads: 16,
            kv_heads: 8,
            head_dim: 128,
            max_positions: 40_960,
            rope_theta: 1e6,
            rms_norm_eps: 1e-6,
            tied: true,
            bos_token: None,
            eos_tokens: Vec::new(),
            pad_token: None,
            initializer_range: 0.02,
        }
    }
}

/// The file's own layout. Fields that this engine has no use for are passed over.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
    initializer_range: Option<f64>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RopeParameters {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

/// transformers writes one token or a list.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(token) => vec![token],
            Self::Many(tokens) => tokens,
        }
    }
}

impl Config {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// The file is missing or not JSON, names another architecture, asks for something that is not computed here,
    /// or states sizes that contradict each other.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        Self::parse(&text).map_err(|problem| Error::model(&path, problem.message).help(problem.help))
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        // The architecture first: another model's file would otherwise be blamed for a missing field.
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Problem::new(format!("not valid JSON: {e}"), "the file may be cut short; copy it again"))?;
        let kind = value.get("model_type").and_then(Value::as_str).map(str::to_owned);
        let raw: Result<Raw, _> = serde_json::from_value(value);
        let architecture = raw.as_ref().ok().and_then(|r| r.architectures.as_ref()?.first().cloned());
        if let Some(named) = kind.as_deref().filter(|k| *k != "qwen3") {
            if ENCODERS.contains(&named) {
                let help = format!("an encoder is for `similarity`; {ONLY_QWEN3}");
                return Err(Problem::new(format!("`{named}` is an encoder, and writes no text"), help));
            }
            return Err(Problem::new(format!("unknown architecture `{named}`"), ONLY_QWEN3));
        }
        let raw = raw.map_err(|e| Problem::new(format!("not a Qwen3 configuration: {e}"), ONLY_QWEN3))?;
        match (&raw.model_type, &architecture) {
            (Some(_), None) => {}
            (_, Some(name)) if matches!(name.as_str(), "Qwen3ForCausalLM" | "Qwen3Model") => {}
            (_, Some(name)) => return Err(Problem::new(format!("unknown architecture `{name}`"), ONLY_QWEN3)),
            (None, None) => {
                return Err(Problem::new("names no architecture (`model_type`, `architectures`)", ONLY_QWEN3));
            }
        }
        raw.supported()?;
        raw.into_config().checked()
    }

    /// The tokens that end a text: those of `generation_config.json`, which transformers and vLLM go by, or else those
    /// of `config.json`.
    ///
    /// # Errors
    /// The file cannot be read, or is no such file.
    pub fn text_ends(&self, folder: &Path) -> Result<Vec<u32>, Error> {
        let path = folder.join("generation_config.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(self.eos_tokens.clone()),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        let generation: Generation = serde_json::from_slice(&bytes).map_err(|e| {
            Error::model(&path, format!("not a generation configuration: {e}")).help("copy the file again")
        })?;
        Ok(generation.eos_token_id.map_or_else(|| self.eos_tokens.clone(), TokenIds::into_vec))
    }

    /// The file's text for a model with these settings, in the layout that transformers 4 and 5 and vLLM read.
    /// `dtype` is the type of the weights beside it, for example `float32`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let eos = match self.eos_tokens.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        json!({
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token,
            "dtype": dtype,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "max_window_layers": self.layers,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": self.pad_token,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "sliding_window": null,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype,
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        })
    }

    /// Query heads for each head of keys and values.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of all query heads side by side.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads side by side.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Every weight's name and shape, as Hugging Face files spell them (`[out, in]` for matrices).
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, h])];
        for layer in 0..self.layers {
            let mut push =
                |name: &str, shape: Vec<usize>| all.push((format!("model.layers.{layer}.{name}.weight"), shape));
            push("input_layernorm", vec![h]);
            push("self_attn.q_proj", vec![self.query_width(), h]);
            push("self_attn.k_proj", vec![self.kv_width(), h]);
            push("self_attn.v_proj", vec![self.kv_width(), h]);
            push("self_attn.o_proj", vec![h, self.query_width()]);
            push("self_attn.q_norm", vec![self.head_dim]);
            push("self_attn.k_norm", vec![self.head_dim]);
            push("post_attention_layernorm", vec![h]);
            push("mlp.gate_proj", vec![f, h]);
            push("mlp.up_proj", vec![f, h]);
            push("mlp.down_proj", vec![h, f]);
        }
        all.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab_size, h]));
        }
        all
    }

    /// # Errors
    /// Sizes of 0, or sizes that contradict each other.
    fn checked(self) -> Result<Self, Problem> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
        ];
        let bad = |message: String| Err(Problem::new(message, "the sizes must be those of the weights beside it"));
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return bad(format!("`{name}` is 0"));
        }
        if let Some((name, size)) = sizes.iter().find(|(_, size)| *size > 1 << 28) {
            return bad(format!("`{name}` is {size}, which no model has"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return bad(format!("{heads} attention heads cannot be shared out over {kv_heads} key-value heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad(format!("`head_dim` is {}, and rotary positions need an even one", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0 && self.rms_norm_eps >= 0.0) {
            return bad("`rope_theta` and `rms_norm_eps` must be positive".to_owned());
        }
        Ok(self)
    }
}

/// What of `generation_config.json` matters here.
#[derive(Deserialize)]
struct Generation {
    eos_token_id: Option<TokenIds>,
}

/// What else people have in such folders: `model_type` of networks that embed, and write nothing.
const ENCODERS: [&str; 10] = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "deberta-v2",
    "electra",
];

const ONLY_QWEN3: &str = "the models that write here are Qwen3s (`model_type: qwen3`, `Qwen3ForCausalLM`): a folder with its \
                          config.json; a stage with an `endpoint` can ask any that a server runs";

struct Problem {
    message: String,
    help: String,
}

impl Problem {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

impl Raw {
    fn supported(&self) -> Result<(), Problem> {
        let refuse = |what: String| Err(Problem::new(format!("{what} is not supported"), "use a model without it"));
        for rope in [&self.rope_scaling, &self.rope_parameters].into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|k| *k != "default") {
                return refuse(format!("rotary scaling of type `{kind}`"));
            }
        }
        if self.use_sliding_window == Some(true) {
            return refuse("a sliding attention window".to_owned());
        }
        if self.attention_bias == Some(true) {
            return refuse("a bias in attention".to_owned());
        }
        if let Some(how) = &self.quantization_config {
            let method = how["quant_method"].as_str().unwrap_or("some method");
            return Err(Problem::new(
                format!("the weights are quantised ({method}), which is not supported"),
                "take the model's weights in bf16, f16 or f32",
            ));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu") => Ok(()),
            Some(other) => refuse(format!("the activation `{other}`")),
        }
    }

    fn into_config(self) -> Config {
        let theta = |rope: &Option<RopeParameters>| rope.as_ref().and_then(|r| r.rope_theta);
        Config {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            // transformers' default for Qwen3, whatever the other sizes are.
            head_dim: self.head_dim.unwrap_or(128),
            max_positions: self.max_position_embeddings.unwrap_or(32_768),
            rope_theta: theta(&self.rope_parameters)
                .or(self.rope_theta)
                .or(theta(&self.rope_scaling))
                .unwrap_or(10_000.0),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            tied: self.tie_word_embeddings.unwrap_or(false),
            bos_token: self.bos_token_id,
            eos_tokens: self.eos_token_id.map_or_else(Vec::new, TokenIds::into_vec),
            pad_token: self.pad_token_id,
            initializer_range: self.initializer_range.unwrap_or(0.02),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Config {
        Config {
            vocab_size: 512,
            hidden_size: 64,
            intermediate_size: 128,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            bos_token: Some(1),
            eos_tokens: vec![2],
            ..Config::default()
        }
    }

    fn problem(edit: impl FnOnce(&mut Value)) -> String {
        let mut value = sample().to_json("float32");
        edit(&mut value);
        Config::parse(&value.to_string()).err().map(|p| p.message).unwrap_or_default()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let parsed = Config::parse(&sample().to_json("float32").to_string());
        assert_eq!(parsed.ok(), Some(sample()));
    }

    #[test]
    fn transformers_5_keeps_theta_in_rope_parameters() {
        let mut value = sample().to_json("float32");
        value["rope_theta"] = Value::Null;
        value["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(Config::parse(&value.to_string()).ok().map(|c| c.rope_theta), Some(5e5));
    }

    #[test]
    fn texts_end_where_the_generation_configuration_says() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(sample().text_ends(folder.path()).unwrap(), [2], "without the file");
        let ends = |text: &str| {
            fs::write(folder.path().join("generation_config.json"), text).unwrap();
            sample().text_ends(folder.path())
        };
        assert_eq!(ends(r#"{"eos_token_id": [5, 6]}"#).unwrap(), [5, 6]);
        assert_eq!(ends(r#"{"eos_token_id": 5}"#).unwrap(), [5]);
        assert_eq!(ends("{}").unwrap(), [2]);
        assert!(ends("{").unwrap_err().to_string().contains("generation_config.json"));
    }

    #[test]
    fn what_is_not_computed_here_is_refused() {
        assert_eq!(problem(|v| v["model_type"] = json!("llama")), "unknown architecture `llama`");
        assert_eq!(problem(|v| v["model_type"] = json!("bert")), "`bert` is an encoder, and writes no text");
        assert_eq!(problem(|v| v["architectures"] = json!(["GPT2"])), "unknown architecture `GPT2`");
        let scaled = problem(|v| v["rope_scaling"] = json!({"type": "yarn", "factor": 4.0}));
        assert_eq!(scaled, "rotary scaling of type `yarn` is not supported");
        let quantised = problem(|v| v["quantization_config"] = json!({"quant_method": "awq"}));
        assert!(quantised.contains("quantised (awq)"), "{quantised}");
        assert!(problem(|v| v["use_sliding_window"] = json!(true)).contains("window"));
        assert!(problem(|v| v["hidden_act"] = json!("gelu")).contains("gelu"));
    }

    #[test]
    fn sizes_that_contradict_each_other_are_refused() {
        assert!(problem(|v| v["num_key_value_heads"] = json!(3)).contains("4 attention heads"));
        assert_eq!(problem(|v| v["vocab_size"] = json!(0)), "`vocab_size` is 0");
        assert!(problem(|v| v["head_dim"] = json!(15)).contains("even"));
        assert!(problem(|v| v["hidden_size"] = json!("x")).starts_with("not a Qwen3 configuration"));
    }
}
