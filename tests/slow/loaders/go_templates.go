// Renders Go templates as Ollama does: `go run go_templates.go < JSON`, a list of {template, system, messages}; prints a
// list of texts. As template.Execute of ollama/ollama: the map of a template that names .Messages.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type question struct {
	Template string     `json:"template"`
	System   string     `json:"system"`
	Messages []*message `json:"messages"`
}

func main() {
	var asked []question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	said := []string{}
	for _, one := range asked {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		var out strings.Builder
		data := map[string]any{"System": one.System, "Messages": one.Messages, "Response": ""}
		if err := parsed.Execute(&out, data); err != nil {
			panic(err)
		}
		said = append(said, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
