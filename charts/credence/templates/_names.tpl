{{/* Names depend on no release: what the programs and the sidecars are told must be found again after a
reinstallation under another one, and two installations in one cluster could not both be right. */}}

{{/* Labels of every object. Takes (dict "root" $ "component" "broker"). */}}
{{- define "credence.labels" -}}
{{ include "credence.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: credence
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The labels that pods are selected by. They can never change: a Deployment's selector is fixed. */}}
{{- define "credence.selector" -}}
app.kubernetes.io/name: credence
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* An image's full name. Takes (dict "root" $ "image" .Values.images.broker). */}}
{{- define "credence.image" -}}
{{- $tag := .image.tag -}}
{{- if not (or $tag .image.digest) }}{{ $tag = .root.Chart.AppVersion }}{{ end -}}
{{ .image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The last component of the sidecar's repository, by which the admission policy knows it. */}}
{{- define "credence.sidecarImageName" -}}
{{ last (splitList "/" .Values.images.sidecar.repository) }}
{{- end }}

{{/* The namespaces where nothing is injected, whatever their labels, as a JSON list. */}}
{{- define "credence.excludedNamespaces" -}}
{{- $names := list .Release.Namespace .Values.certificates.certManagerNamespace -}}
{{- if not .Values.webhook.allowKubeSystem }}{{ $names = append $names "kube-system" }}{{ end -}}
{{ $names | uniq | sortAlpha | toJson }}
{{- end }}

{{/* Thousandths of a processor, of 50m or 1. */}}
{{- define "credence.millis" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text }}{{ trimSuffix "m" $text }}{{ else }}{{ mul 1000 (int $text) }}{{ end -}}
{{- end }}
